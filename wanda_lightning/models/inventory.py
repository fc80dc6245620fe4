"""The inventory of a model: layers to prune, grouped into units, and what is left dense, with a reason for each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wanda_lightning.models.experts import routers, stacked_experts
from wanda_lightning.models.layers import Layer, layer_kinds
from wanda_lightning.models.quantized import quantizer
from wanda_lightning.models.task import own_head


class SkipReason(str, Enum):
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
        return self.value in ("adapter", "embedding", "output_head", "router", "stem", "tied", "user", "uncoupled")


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
class Unit:
    """A part of the model at which calibration batches stop: a block, a layer, or (module None) the whole model."""

    name: str
    module: nn.Module | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Inventory:
    """Every matrix of a model."""

    units: tuple[Unit, ...]  # the layers to prune, in model order
    skipped: tuple[SkippedMatrix, ...]  # all other matrices
    blocks: Mapping[str, str]  # by layer: the name of its block, or of its module if it lies in no block

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune, in model order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    def skipped_for(self, reason: SkipReason) -> tuple[SkippedMatrix, ...]:
        """Return the matrices that are skipped for a reason, largest first."""
        return tuple(sorted((m for m in self.skipped if m.reason is reason), key=lambda matrix: -matrix.size))


_STEM = re.compile(r"(^|\.)((conv_)?stem|patch_embed(ding)?s?|patch_embedder)(\.|$)")
_STANDARDIZED = re.compile("Std(Conv|Linear)|WeightStandardi[sz]ed")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_IMAGE_CHANNELS = 4  # a first convolution with at most so many input channels reads the raw image or signal


def skip_packed(name: str, weight: Tensor, module: nn.Module) -> SkippedMatrix:
    """Skip a matrix of packed or quantized weights. Pruning refuses it unless the user skips it."""
    dtype, kind = str(weight.dtype).removeprefix("torch."), type(weight).__name__
    if library := quantizer(module, weight):
        detail = f"quantized by {library} ({type(module).__name__}, {kind}): prune first, then quantize"
    else:
        form = dtype if weight.layout is torch.strided else str(weight.layout)
        detail = f"{form} weights of type {kind} cannot be pruned in place"
    return SkippedMatrix(name, tuple(weight.shape), SkipReason.QUANTIZED, detail)


def skip_unsupported(name: str, shape: tuple[int, ...], module: nn.Module, parameter_name: str) -> SkippedMatrix:
    """Skip a parameter that has two or more dimensions but is not the weight of a supported layer."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return SkippedMatrix(name, shape, SkipReason.EMBEDDING, "embedding")
    return SkippedMatrix(name, shape, SkipReason.UNSUPPORTED, _why_unsupported(module, parameter_name))


def _why_unsupported(module: nn.Module, parameter_name: str) -> str:
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
            overrides = f"{type(module).__module__}.{kind} overrides the forward of {known.layer_type.__name__}"
            standard = "standardizes its weight in each forward, so zeros of the stored weight do not stay zero"
            return f"{kind} {standard}" if _STANDARDIZED.search(kind) else overrides
    if parameter_name in stacked_experts(module):
        return f"{kind} does not show which dimension of the experts' matrices in {parameter_name} is the input"
    return f"{parameter_name} of {kind} is not the weight of a supported layer ({', '.join(layer_kinds())})"


def skip_by_default(modules: Mapping[str, nn.Module]) -> dict[str, tuple[SkipReason, str]]:
    """Return the reasons to skip modules of supported kinds, with details, by module name."""
    first = {next((m for m in modules.values() if isinstance(m, kind)), None) for kind in _CONVOLUTIONS}
    heads = set().union(*(_heads(module) for module in modules.values()))
    routing = routers(modules)
    stems = [(name, pattern) for name, module in modules.items() for pattern in _timm_stems(module)]
    adapters = tuple(
        f"{name}.{part}."
        for name, module in modules.items()
        for part in getattr(type(module), "adapter_layer_names", ())  # peft's layers
    )

    def reads_raw(module: Any, kind: type[nn.Conv1d] | type[nn.Conv2d]) -> bool:
        return module in first and isinstance(module, kind) and module.in_channels <= _IMAGE_CHANNELS

    def is_depthwise(module: Any) -> bool:
        return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels

    def is_timm_stem(name: str) -> bool:
        return any(name.startswith(top) and pattern.match(name[len(top) :].lstrip(".")) for top, pattern in stems)

    rows: tuple[tuple[SkipReason, str, Callable[[str, nn.Module], object]], ...] = (  # the first that holds counts
        (SkipReason.OUTPUT_HEAD, "output head", lambda name, module: module in heads),
        (SkipReason.ADAPTER, "adapter: trained, not pruned", lambda name, module: name.startswith(adapters)),
        (SkipReason.ROUTER, "router", lambda name, module: module in routing),
        (SkipReason.DEPTHWISE, "depthwise convolution", lambda name, module: is_depthwise(module)),
        (SkipReason.STEM, "stem: reads the raw image", lambda name, module: reads_raw(module, nn.Conv2d)),
        (SkipReason.STEM, "stem: reads the raw signal", lambda name, module: reads_raw(module, nn.Conv1d)),
        (SkipReason.STEM, "stem or patch embedding", lambda name, module: _STEM.search(name) or is_timm_stem(name)),
    )
    found = {
        name: next(((reason, detail) for reason, detail, holds in rows if holds(name, module)), None)
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
    if tops and isinstance(body, nn.Module) and body is not module:  # a transformers body with a task head
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
    stem = groups.get("stem", ()) if isinstance(groups, Mapping) else ()  # a few models return a function instead
    return [re.compile(pattern) for pattern in ([stem] if isinstance(stem, str) else stem) if isinstance(pattern, str)]
