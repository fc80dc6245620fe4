"""The inventory of a model: layers to prune, grouped into stops, and what is left dense, with a reason for each."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from wanda_lightning.common.layer_names import check_patterns, matches, refuse_unmatched
from wanda_lightning.core.patterns import Pattern, Unstructured
from wanda_lightning.models.expert_stacks import routers, stacked_experts, stored_by_columns
from wanda_lightning.models.layers import (
    Layer,
    layer_kinds,
    layers_of,
    named_modules,
    uncompiled_name,
)
from wanda_lightning.models.quantized import is_packed, is_packed_weight, quantizer
from wanda_lightning.models.task import own_head


class SkipReason(StrEnum):
    """Reasons to leave a matrix dense."""

    ADAPTER = "adapter"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    ROUTER = "router"
    STEM = "stem"
    TIED = "tied"
    DEPTHWISE = "depthwise"
    GROUPED = "grouped"  # in reports of version 0.2
    QUANTIZED = "quantized"
    NO_SHAPE = "no_shape"
    UNSUPPORTED = "unsupported"
    PATTERN = "pattern"
    USER = "user"
    UNREACHED = "unreached"
    UNROUTED = "unrouted"
    INACTIVE = "inactive"
    UNCOUPLED = "uncoupled"

    @property
    def is_expected(self) -> bool:
        """Whether users expect that such a matrix stays dense, or asked for it."""
        return self.value in (
            "adapter",
            "embedding",
            "output_head",
            "router",
            "stem",
            "tied",
            "user",
            "uncoupled",
        )


@dataclass(frozen=True)
class SkippedMatrix:
    """A matrix that is left dense."""

    name: str  # of the layer, or of the parameter if it belongs to no layer
    shape: tuple[int, ...]  # as stored
    reason: SkipReason
    detail: str  # the reason in words

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stop:
    """A place where calibration batches wait, the entry of a block or a layer. Without a module, none waits."""

    name: str
    module: nn.Module | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Inventory:
    """Every matrix of a model."""

    stops: tuple[Stop, ...]  # the layers to prune, in model order
    skipped: tuple[SkippedMatrix, ...]  # all other matrices
    # By layer: the name of its block, or of its module if it lies in no block.
    blocks: Mapping[str, str]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune, in model order."""
        return tuple(layer for stop in self.stops for layer in stop.layers)

    def skipped_for(self, reason: SkipReason) -> tuple[SkippedMatrix, ...]:
        """Return the matrices that are skipped for a reason, largest first."""
        return tuple(
            sorted((m for m in self.skipped if m.reason is reason), key=lambda matrix: -matrix.size)
        )


def find_layers(
    model: nn.Module,
    sequential: str = "block",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    pattern: Pattern = Unstructured(),
) -> Inventory:
    """Find the layers to prune, group them into stops, and list every other matrix with its reason.

    `PruningConfig.from_names` describes the arguments; `sequential` is `"block"`, `"layer"` or `"none"`. Layers whose
    width does not fit the pattern are skipped. The weights are not read, so the model may be on the meta device. Raises
    a ValueError if a pattern in `skip` or `only` matches no matrix.
    """
    finder = _Finder(model)
    finder.sort_parameters()
    finder.skip_tied_to_skipped()
    finder.apply_user_patterns(check_patterns("skip", skip), check_patterns("only", only))
    finder.skip(
        SkipReason.UNSUPPORTED, lambda layer: "has no elements" if 0 in layer.shape else None
    )
    # Find blocks before the pattern removes layers: blocks must not depend on the pattern.
    blocks = finder.block_of_each_layer()
    finder.skip(SkipReason.PATTERN, lambda layer: pattern.why_not(layer.shape[1]))
    return Inventory(finder.stops(sequential, blocks), tuple(finder.skipped), blocks)


class _Finder:
    """Sorts the parameters of a model into layers and skipped matrices."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = named_modules(model)
        self.layers: list[Layer] = []
        self.skipped: list[SkippedMatrix] = []
        self._defaults = _skip_by_default(self.modules)
        self._by_columns = stored_by_columns(self.modules)
        self._module_names = {module: name or "weight" for name, module in self.modules.items()}
        self._aliases: dict[str, list[str]] = {}  # the other names of each tied matrix
        self._owners: dict[int, str] = {}  # the first name of each parameter, by its id
        for name, module in self.modules.items():
            if isinstance(module, _EMBEDDINGS):
                self._owners.setdefault(id(module.weight), name)

    def sort_parameters(self) -> None:
        """Sort every matrix into the layers or the skipped matrices; the user's choices come later."""
        for full_name, buffer in self.model.named_buffers():
            name = uncompiled_name(full_name)
            if is_packed_weight(name, buffer):
                detail = _why_packed(buffer, self.modules[name.rpartition(".")[0]])
                self._skip(name, buffer, SkipReason.QUANTIZED, detail)
        for full_name, parameter in self.model.named_parameters(remove_duplicate=False):
            name = uncompiled_name(full_name)
            module_name = name.rpartition(".")[0]
            if isinstance(parameter, UninitializedParameter):
                detail = "has no shape yet: run one batch through the model first"
                self.skipped.append(SkippedMatrix(name, (), SkipReason.NO_SHAPE, detail))
            elif (
                parameter.ndim >= 2 and module_name in self.modules
            ):  # otherwise a second name of the same module
                self._sort(name, module_name, parameter)

    def _sort(self, name: str, module_name: str, parameter: Tensor) -> None:
        module = self.modules[module_name]
        parameter_name = name.rpartition(".")[2]
        label = module_name if parameter_name == "weight" and module_name else name
        default = self._defaults.get(module_name) if parameter_name == "weight" else None
        found = (
            []
            if default
            else layers_of(label, module, parameter_name, self.modules, self._by_columns)
        )
        default = default or (self._defaults.get(module_name) if found else None)
        owner = self._owners.setdefault(id(parameter), label)
        if owner != label:
            self._skip(label, parameter, SkipReason.TIED, f"tied to {owner}")
            self._aliases.setdefault(owner, []).append(label)
            for part in found:  # experts, or groups of a convolution
                if suffix := part.name.removeprefix(label):
                    self._aliases.setdefault(owner + suffix, []).append(part.name)
        elif is_packed(parameter) or quantizer(module, parameter):
            self._skip(label, parameter, SkipReason.QUANTIZED, _why_packed(parameter, module))
        elif default:
            self._skip(label, parameter, *default)
        elif found:
            self.layers.extend(found)
        else:
            self._skip(
                label, parameter, SkipReason.UNSUPPORTED, _why_unsupported(module, parameter_name)
            )

    def _skip(self, name: str, tensor: Tensor, reason: SkipReason, detail: str) -> None:
        self.skipped.append(SkippedMatrix(name, tuple(tensor.shape), reason, detail))

    def skip_tied_to_skipped(self) -> None:
        """Skip layers that share their parameter with a module that is skipped by default, such as the output head."""

        def tied(layer: Layer) -> str | None:
            other = next(
                (name for name in self._aliases.get(layer.name, ()) if name in self._defaults), None
            )
            return None if other is None else f"tied to {other}: {self._defaults[other][1]}"

        self.skip(SkipReason.TIED, tied)

    def apply_user_patterns(self, skip: Sequence[str], only: Sequence[str]) -> None:
        """Skip the matrices that `skip` names and those that `only` does not name."""
        every = [layer.name for layer in self.layers] + [matrix.name for matrix in self.skipped]
        refuse_unmatched(skip, every, "skip", "matrix")
        refuse_unmatched(only, every, "only", "matrix")

        def by_user(matrix: Layer | SkippedMatrix) -> str | None:
            names = (matrix.name, *self._aliases.get(matrix.name, ()))
            for pattern in skip:
                if any(matches(name, pattern, "skip") for name in names):
                    return f"skip={pattern!r}"
            if only and not any(
                matches(name, pattern, "only") for name in names for pattern in only
            ):
                return f"not in only={list(only)}"
            return None

        # The user's choice replaces every other reason: quantized weights that the user skips are not refused.
        self.skipped = [
            replace(matrix, reason=SkipReason.USER) if by_user(matrix) else matrix
            for matrix in self.skipped
        ]
        self.skip(SkipReason.USER, by_user)

    def skip(self, reason: SkipReason, detail_of: Callable[[Layer], str | None]) -> None:
        """Skip the layers for which `detail_of` returns a detail."""
        layers = self.layers
        self.layers = []
        for layer in layers:
            if (detail := detail_of(layer)) is None:
                self.layers.append(layer)
            else:
                self.skipped.append(SkippedMatrix(layer.name, layer.stored_shape, reason, detail))

    def block_of_each_layer(self) -> dict[str, str]:
        """Map the name of each layer to the name of its block, or of its module if it lies in no block."""
        blocks = _find_blocks(self.modules, self.layers)
        modules = self._module_names
        return {
            layer.name: next(
                (name for name in blocks if layer.name.startswith(f"{name}.")),
                modules[layer.module],
            )
            for layer in self.layers
        }

    def stops(self, sequential: str, blocks: Mapping[str, str]) -> tuple[Stop, ...]:
        """Group the layers into stops."""
        if sequential == "none":
            return (Stop("", None, tuple(self.layers)),) if self.layers else ()
        members: dict[str, list[Layer]] = {}
        for layer in self.layers:
            # Experts or groups of one parameter form one stop: batches can stop only at their module.
            name = blocks[layer.name] if sequential == "block" else self._module_names[layer.module]
            members.setdefault(name, []).append(layer)
        return tuple(
            Stop(name, self.modules.get(name, self.model), tuple(inner))
            for name, inner in members.items()
        )


def _find_blocks(modules: Mapping[str, nn.Module], layers: Iterable[Layer]) -> list[str]:
    """Return the names of the blocks, given all modules by name and the layers to prune. No block lies inside another.

    The blocks of transformers have a base class of their own (`GradientCheckpointingLayer`). Elsewhere a block is a
    member of a list or sequence that contains at least two layers and no smaller such member: a stage that consists of
    blocks is not a block.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # The number of distinct modules with layers inside each module.
    names = {layer.module: layer.name.split(".") for layer in layers}.values()
    counts = Counter(".".join(parts[:length]) for parts in names for length in range(len(parts)))
    marked = [
        name
        for name, m in modules.items()
        if isinstance(m, GradientCheckpointingLayer) and counts[name]
    ]
    inside = tuple(f"{name}." for name in marked)
    listed = [
        name
        for name in _members_of_lists(modules)
        if counts[name] >= 2 and not f"{name}.".startswith(inside)
    ]
    candidates = marked + listed
    return [
        name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)
    ]


_LISTS = (nn.ModuleList, nn.Sequential)


def _members_of_lists(modules: Mapping[str, nn.Module]) -> list[str]:
    return [
        f"{name}.{child}" if name else child
        for name, container in modules.items()
        if isinstance(container, _LISTS)
        or type(container).__name__ == "IntermediateLayerGetter"  # of torchvision
        if not name.endswith("experts")
        for child, member in container.named_children()
        if not isinstance(member, _LISTS)
    ]


# ---- reasons to skip

_STEM = re.compile(r"(^|\.)((conv_)?stem|patch_embed(ding)?s?|patch_embedder)(\.|$)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_IMAGE_CHANNELS = (
    4  # a first convolution with at most so many input channels reads the raw image or signal
)


def _why_packed(weight: Tensor, module: nn.Module) -> str:
    """Return why packed or quantized weights stay as they are. Pruning refuses them unless the user skips them."""
    if library := quantizer(module, weight):
        kinds = f"{type(module).__name__}, {type(weight).__name__}"
        return f"quantized by {library} ({kinds}): prune first, then quantize"
    form = (
        str(weight.dtype).removeprefix("torch.")
        if weight.layout is torch.strided
        else weight.layout
    )
    return f"{form} weights of type {type(weight).__name__} cannot be pruned in place"


def _why_unsupported(module: nn.Module, parameter_name: str) -> str:
    """Return why a parameter of two or more dimensions is not the weight of a supported layer."""
    kind = type(module).__name__
    if isinstance(module, parametrize.ParametrizationList):
        by = ", ".join(type(parametrization).__name__ for parametrization in module)
        return f"parametrized by {by}: make it an ordinary weight first, with parametrize.remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            how = "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
            return f"recomputed in each forward by {type(hook).__name__}: make it an ordinary weight first, with {how}"
    for known in layer_kinds().values() if parameter_name == "weight" else ():
        if isinstance(module, known.layer_type):
            return f"{type(module).__module__}.{kind} overrides the forward of {known.layer_type.__name__}"
    if parameter_name in stacked_experts(module):
        return f"{kind} does not show which dimension of the experts' matrices in {parameter_name} is the input"
    return f"{parameter_name} of {kind} is not the weight of a supported layer ({', '.join(layer_kinds())})"


def _skip_by_default(modules: Mapping[str, nn.Module]) -> dict[str, tuple[SkipReason, str]]:
    """Return the reasons to skip the weights of modules, with details, by module name."""
    first = [
        next((m for m in modules.values() if isinstance(m, kind)), None) for kind in _CONVOLUTIONS
    ]
    raw = {m for m in first if m is not None and m.in_channels <= _IMAGE_CHANNELS}
    heads = set().union(*(_heads(module) for module in modules.values()))
    routing = routers(modules)
    stems = [(name, pattern) for name, module in modules.items() for pattern in _timm_stems(module)]
    adapters = tuple(
        f"{name}.{part}."
        for name, module in modules.items()
        for part in getattr(type(module), "adapter_layer_names", ())  # peft's layers
    )

    def is_depthwise(module: Any) -> bool:
        return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels

    def is_timm_stem(name: str) -> bool:
        return any(
            name.startswith(top) and pattern.match(name[len(top) :].lstrip("."))
            for top, pattern in stems
        )

    rows: tuple[
        tuple[SkipReason, str, Callable[[str, nn.Module], object]], ...
    ] = (  # the first that holds counts
        (SkipReason.OUTPUT_HEAD, "output head", lambda name, module: module in heads),
        (
            SkipReason.ADAPTER,
            "adapter: trained, not pruned",
            lambda name, module: name.startswith(adapters),
        ),
        (SkipReason.ROUTER, "router", lambda name, module: module in routing),
        (SkipReason.DEPTHWISE, "depthwise convolution", lambda name, module: is_depthwise(module)),
        (
            SkipReason.STEM,
            "stem: reads the raw image or signal",
            lambda name, module: module in raw,
        ),
        (
            SkipReason.STEM,
            "stem or patch embedding",
            lambda name, module: _STEM.search(name) or is_timm_stem(name),
        ),
        (SkipReason.EMBEDDING, "embedding", lambda name, module: isinstance(module, _EMBEDDINGS)),
    )
    found = {
        name: next(
            ((reason, detail) for reason, detail, holds in rows if holds(name, module)), None
        )
        for name, module in modules.items()
    }
    return {name: row for name, row in found.items() if row}


def _heads(module: nn.Module) -> set[nn.Module]:
    """Return the modules of the output head that a model or submodel declares."""
    tops: list[Any] = []
    if callable(_method(module, "get_output_embeddings")):
        tops.append(own_head(module))
    if callable(get_classifier := _method(module, "get_classifier")):
        classifier = get_classifier()
        tops.extend(classifier if isinstance(classifier, tuple | list) else [classifier])
    body = module.base_model if hasattr(type(module), "base_model") else None
    # A transformers body with a task head.
    if tops and isinstance(body, nn.Module) and body is not module:
        tops.extend(child for child in module.children() if child is not body)
    return {inner for top in tops if isinstance(top, nn.Module) for inner in top.modules()}


def _method(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """Return a method that the module's class defines; a wrapper that forwards attribute access does not count."""
    return getattr(module, name) if hasattr(type(module), name) else None


def _timm_stems(module: nn.Module) -> list[re.Pattern[str]]:
    """Return a timm model's regular expressions for its stem; they match the start of a parameter's name."""
    if not callable(group_matcher := _method(module, "group_matcher")):
        return []
    groups = group_matcher(coarse=False)
    # A few models return a function instead.
    stem = groups.get("stem", ()) if isinstance(groups, Mapping) else ()
    return [
        re.compile(pattern)
        for pattern in ([stem] if isinstance(stem, str) else stem)
        if isinstance(pattern, str)
    ]
