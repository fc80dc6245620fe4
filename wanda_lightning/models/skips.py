"""Choose the matrices that are left dense by default, with the reason for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wanda_lightning.models.experts import routers, stacked_experts
from wanda_lightning.models.inventory import SkippedMatrix, SkipReason
from wanda_lightning.models.layers import layer_kinds
from wanda_lightning.models.quantized import quantizer
from wanda_lightning.models.task import own_head

_STEM = re.compile(r"(^|\.)((conv_)?stem|patch_embed(ding)?s?|patch_embedder)(\.|$)")
_STANDARDIZED = re.compile("Std(Conv|Linear)|WeightStandardi[sz]ed")
_REMOVERS = {  # torch hooks that recompute a weight in each forward, and the call that removes them
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
    "BasePruningMethod": "torch.nn.utils.prune.remove(layer, 'weight')",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_IMAGE_CHANNELS = 4  # a first convolution with at most so many input channels reads the raw image or signal


def skip_packed(name: str, weight: Tensor, module: nn.Module) -> SkippedMatrix:
    """Skip a matrix of packed or quantized weights. Pruning refuses it unless the user skips it."""
    dtype, kind = str(weight.dtype).removeprefix("torch."), type(weight).__name__
    if library := quantizer(module, weight):
        detail = f"quantized by {library} ({type(module).__name__}, {kind}): prune first, then quantize"
    elif weight.layout is not torch.strided:
        detail = f"weights of layout {weight.layout} cannot be pruned in place"
    elif weight.is_floating_point() and weight.element_size() >= 2:
        detail = f"weights of type {kind} cannot be pruned in place"
    else:
        detail = f"{dtype} weights cannot be pruned in place"
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
        for base in type(hook).__mro__:
            if base.__module__.startswith("torch.nn.utils.") and base.__name__ in _REMOVERS:
                remover = _REMOVERS[base.__name__]
                return f"recomputed in each forward by {type(hook).__name__}: make it an ordinary weight with {remover}"
    for known in layer_kinds().values():
        if isinstance(module, known.layer_type) and parameter_name == "weight":
            if _STANDARDIZED.search(kind):
                return (
                    f"{kind} standardizes its weight in each forward, so zeros of the stored weight do not stay zero. "
                    f"Make it a {known.layer_type.__name__} with the standardized weight first"
                )
            return f"{type(module).__module__}.{kind} overrides the forward of {known.layer_type.__name__}"
    if parameter_name in stacked_experts(module):
        return f"{kind} does not show which dimension of the experts' matrices in {parameter_name} is the input"
    return f"{parameter_name} of {kind} is not the weight of a supported layer ({', '.join(layer_kinds())})"


def skip_by_default(modules: Mapping[str, nn.Module]) -> dict[str, tuple[SkipReason, str]]:
    """Return the reasons to skip modules of supported kinds, with details, by module name."""
    first = {
        next((name for name, module in modules.items() if isinstance(module, kind)), None) for kind in _CONVOLUTIONS
    }
    heads = set().union(*(_heads(module) for module in modules.values()))
    all_routers = routers(modules)
    stems = [(name, pattern) for name, module in modules.items() for pattern in _timm_stems(module)]
    adapters = tuple(
        f"{name}.{part}."
        for name, module in modules.items()
        for part in getattr(type(module), "adapter_layer_names", ())  # peft's layers
    )
    reasons: dict[str, tuple[SkipReason, str]] = {}
    for name, module in modules.items():
        if module in heads:
            reasons[name] = SkipReason.OUTPUT_HEAD, "output head"
        elif name.startswith(adapters):
            reasons[name] = SkipReason.ADAPTER, "adapter: trained, not pruned"
        elif module in all_routers:
            reasons[name] = SkipReason.ROUTER, "router"
        elif isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels:
            reasons[name] = SkipReason.DEPTHWISE, "depthwise convolution"
        elif isinstance(module, _CONVOLUTIONS) and name in first and module.in_channels <= _IMAGE_CHANNELS:
            raw = "image" if isinstance(module, nn.Conv2d) else "signal"
            reasons[name] = SkipReason.STEM, f"stem: reads the raw {raw}"
        elif _STEM.search(name) or any(
            name.startswith(prefix) and pattern.match(name[len(prefix) :].lstrip(".")) for prefix, pattern in stems
        ):
            reasons[name] = SkipReason.STEM, "stem or patch embedding"
    return reasons


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
