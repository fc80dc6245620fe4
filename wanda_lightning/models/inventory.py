"""The inventory of a model: layers to prune, grouped into stops, and what is left dense, with a reason for each."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.common.grouping import grouped
from wanda_lightning.common.layer_names import check_patterns, matches, refuse_unmatched
from wanda_lightning.core.patterns import Pattern, Unstructured
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models.blocks import find_blocks
from wanda_lightning.models.expert_stacks import stored_by_columns
from wanda_lightning.models.layers import Layer, layers_of, named_modules, uncompiled_name
from wanda_lightning.models.quantized import is_packed, is_packed_weight, is_wrapper, quantizer
from wanda_lightning.models.skip_reasons import (
    EMBEDDINGS,
    SkipReason,
    default_reasons,
    why_packed,
    why_unsupported,
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


SkippedMatrices = Mapping[str, SkippedMatrix]
"""Matrices that are left dense, by name."""


@dataclass(frozen=True)
class Stop:
    """A point where calibration batches wait, the entry of a block or a layer. Without a module, none waits."""

    name: str
    module: Module | None
    layers: tuple[Layer, ...]

    @property
    def is_block(self) -> bool:
        """Whether the module contains the layers, instead of being a layer itself."""
        if self.module is None:
            return False
        return all(layer.module is not self.module for layer in self.layers)


Stops = tuple[Stop, ...]
"""Stops in the order in which batches reach them."""


def group_by_stop(layers: Iterable[Layer], stop_of: Mapping[str, str], model: Module) -> Stops:
    """Group layers into stops, in the order of the layers. `stop_of` holds the module of each layer's stop, by name."""
    modules = named_modules(model)
    members = grouped(layers, lambda layer: stop_of[layer.name])
    return tuple(
        Stop(name, modules.get(name, model), tuple(inside)) for name, inside in members.items()
    )


@dataclass(frozen=True)
class Inventory:
    """Every matrix of a model."""

    stops: Stops  # the layers to prune, in model order
    skipped: tuple[SkippedMatrix, ...]  # all other matrices
    # By layer: the name of its block, or of its module if it lies in no block.
    blocks: Mapping[str, str]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune, in model order."""
        return tuple(layer for stop in self.stops for layer in stop.layers)

    def skipped_for(self, reason: SkipReason) -> tuple[SkippedMatrix, ...]:
        """Return the matrices that are skipped for a reason, largest first."""
        skipped = [matrix for matrix in self.skipped if matrix.reason is reason]
        return tuple(sorted(skipped, key=lambda matrix: -matrix.size))


def number_of_parameters(model: Module) -> int:
    """Return the number of parameters of a model without lazy modules."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_parameters(model: Module) -> tuple[int, int]:
    """Return the number of parameters of a model, and how many of those in memory are zero."""
    number = 0
    zeros = 0
    for parameter in model.parameters():
        if isinstance(parameter, UninitializedParameter):
            continue  # of a lazy module that no batch has called
        number += parameter.numel()
        if not is_wrapper(parameter) and not is_unloaded(parameter):
            zeros += int((parameter.detach() == 0).count_nonzero())
    return number, zeros


def find_layers(
    model: Module,
    sequential: str = "block",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    pattern: Pattern = Unstructured(),
) -> Inventory:
    """Find the layers to prune, group them into stops, and list every other matrix with its reason.

    `PruningConfig` describes the arguments; `sequential` is `"block"`, `"layer"` or `"none"`. Layers whose
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

    def __init__(self, model: Module) -> None:
        self.model = model
        self.modules = named_modules(model)
        self.layers: list[Layer] = []
        self.skipped: list[SkippedMatrix] = []
        self._default_reasons = default_reasons(self.modules)
        self._by_columns = stored_by_columns(self.modules)
        # A model that is itself a layer has no name; its layer is called like its parameter.
        self._module_names = {module: name or "weight" for name, module in self.modules.items()}
        # The other names of each tied matrix.
        self._aliases = defaultdict[str, list[str]](list)
        # The name of the matrix that owns each parameter, by the parameter's id. Embeddings come first: a weight that
        # is tied to one is not pruned, even if the layer comes before the embedding.
        self._owners: dict[int, str] = {}
        for name, module in self.modules.items():
            if isinstance(module, EMBEDDINGS):
                self._owners.setdefault(id(module.weight), name)

    def sort_parameters(self) -> None:
        """Sort every matrix into the layers or the skipped matrices; the user's choices come later."""
        for full_name, buffer in self.model.named_buffers():
            name = uncompiled_name(full_name)
            if is_packed_weight(name, buffer):
                detail = why_packed(buffer, self.modules[name.rpartition(".")[0]])
                self._skip(name, buffer, SkipReason.QUANTIZED, detail)

        for full_name, parameter in self.model.named_parameters(remove_duplicate=False):
            name = uncompiled_name(full_name)
            if isinstance(parameter, UninitializedParameter):
                detail = "has no shape yet: run one batch through the model first"
                self.skipped.append(SkippedMatrix(name, (), SkipReason.NO_SHAPE, detail))
            # A module with two names has only the first in `modules`.
            elif parameter.ndim >= 2 and name.rpartition(".")[0] in self.modules:
                self._sort(name, parameter)

    def _sort(self, full_name: str, parameter: Tensor) -> None:
        module_name, _, parameter_name = full_name.rpartition(".")
        module = self.modules[module_name]
        is_weight = parameter_name == "weight"
        name = module_name if is_weight and module_name else full_name

        reason = self._default_reasons.get(module_name)
        layers = []
        if reason is None or not is_weight:
            layers = layers_of(name, module, parameter_name, self.modules, self._by_columns)
        if not is_weight and not layers:
            # The reason concerns the weight, and experts, but no other parameters of the module.
            reason = None

        owner = self._owners.setdefault(id(parameter), name)
        if owner != name:
            self._skip(name, parameter, SkipReason.TIED, f"tied to {owner}")
            self._note_aliases(owner, name, layers)
        elif is_packed(parameter) or quantizer(module, parameter):
            self._skip(name, parameter, SkipReason.QUANTIZED, why_packed(parameter, module))
        elif reason:
            self._skip(name, parameter, reason.kind, reason.detail)
        elif layers:
            self.layers.extend(layers)
        else:
            detail = why_unsupported(module, parameter_name)
            self._skip(name, parameter, SkipReason.UNSUPPORTED, detail)

    def _note_aliases(self, owner: str, name: str, layers: Iterable[Layer]) -> None:
        """Note that a matrix has a second name, and so do its experts or groups."""
        self._aliases[owner].append(name)
        for layer in layers:
            suffix = layer.name.removeprefix(name)
            if suffix:
                self._aliases[owner + suffix].append(layer.name)

    def _skip(self, name: str, tensor: Tensor, reason: SkipReason, detail: str) -> None:
        self.skipped.append(SkippedMatrix(name, tuple(tensor.shape), reason, detail))

    def skip_tied_to_skipped(self) -> None:
        """Skip layers that share their parameter with a module that is skipped by default, such as the output head."""

        def tied(layer: Layer) -> str | None:
            for alias in self._aliases[layer.name]:
                reason = self._default_reasons.get(alias)
                if reason:
                    return f"tied to {alias}: {reason.detail}"
            return None

        self.skip(SkipReason.TIED, tied)

    def apply_user_patterns(self, skip: Sequence[str], only: Sequence[str]) -> None:
        """Skip the matrices that `skip` names and those that `only` does not name."""
        names = [layer.name for layer in self.layers] + [matrix.name for matrix in self.skipped]
        refuse_unmatched(skip, names, "skip", "matrix")
        refuse_unmatched(only, names, "only", "matrix")

        def by_user(matrix: Layer | SkippedMatrix) -> str | None:
            names = (matrix.name, *self._aliases[matrix.name])
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
            detail = detail_of(layer)
            if detail is None:
                self.layers.append(layer)
            else:
                self.skipped.append(SkippedMatrix(layer.name, layer.stored_shape, reason, detail))

    def block_of_each_layer(self) -> dict[str, str]:
        """Map the name of each layer to the name of its block, or of its module if it lies in no block."""
        block_of = self._module_of_each_layer()
        for block in find_blocks(self.modules, self.layers):
            block_of |= {name: block for name in block_of if name.startswith(f"{block}.")}
        return block_of

    def _module_of_each_layer(self) -> dict[str, str]:
        return {layer.name: self._module_names[layer.module] for layer in self.layers}

    def stops(self, sequential: str, blocks: Mapping[str, str]) -> Stops:
        """Group the layers into stops."""
        if sequential == "none":
            return (Stop("", None, tuple(self.layers)),) if self.layers else ()
        # Experts or groups of one parameter form one stop: batches can stop only at their module.
        stop_of = blocks if sequential == "block" else self._module_of_each_layer()
        return group_by_stop(self.layers, stop_of, self.model)
