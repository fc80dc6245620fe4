"""Why a matrix is left as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wanda_lightning.models.experts import routers, stacked_experts
from wanda_lightning.models.inventory import Skipped
from wanda_lightning.models.layers import kind_of, layer_kinds
from wanda_lightning.models.quantized import quantizer

_STEM = re.compile(r"(^|\.)((conv_)?stem|patch_embed(ding)?s?|patch_embedder)(\.|$)")
_STANDARDISED = re.compile("Std(Conv|Linear)|WeightStandardi[sz]ed")
_REMOVERS = {  # old hooks of torch that make a weight anew at each forward, by class
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
    "BasePruningMethod": "torch.nn.utils.prune.remove(layer, 'weight')",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_IMAGE_CHANNELS = 4  # a model's first convolution, over so few channels, reads the raw image or signal


def packed(name: str, weight: Tensor, module: nn.Module) -> Skipped:
    """The matrix of such a weight, which the user must decide about."""
    dtype, kind = str(weight.dtype).removeprefix("torch."), type(weight).__name__
    if library := quantizer(module, weight):
        reason = f"quantised by {library} ({type(module).__name__}, {kind}): prune first, then quantise"
    elif weight.is_floating_point() and weight.element_size() >= 2:
        reason = f"weights of type {kind} cannot be pruned in place"
    else:
        reason = f"{dtype} weights cannot be pruned in place"
    return Skipped(name, tuple(weight.shape), reason, True)


def why_no_layer(module: nn.Module, parameter_name: str) -> str:
    """Why a parameter of two dimensions or more is no layer that can be pruned."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, parametrize.ParametrizationList):
        by = ", ".join(type(parametrization).__name__ for parametrization in module)
        return f"parametrised by {by}: make it an ordinary weight first, with parametrize.remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        for base in type(hook).__mro__:
            if base.__module__.startswith("torch.nn.utils.") and base.__name__ in _REMOVERS:
                remover = _REMOVERS[base.__name__]
                return f"made anew at each forward by {type(hook).__name__}: make it an ordinary weight with {remover}"
    for known in layer_kinds().values():
        if isinstance(module, known.layer_type) and parameter_name == "weight":
            if _STANDARDISED.search(kind):
                return (
                    f"{kind} standardises its weight at each forward: what is zero in the stored weight is not zero in "
                    f"the used one. Make it a {known.layer_type.__name__} of the standardised weight first"
                )
            return f"{type(module).__module__}.{kind} overrides the forward of {known.layer_type.__name__}"
    if parameter_name in stacked_experts(module):
        return f"{parameter_name} of {kind} does not say which side of its experts' matrices is the input"
    return f"{parameter_name} of {kind} is not the weight of a supported layer ({', '.join(layer_kinds())})"


def reasons_to_skip(model: nn.Module, modules: dict[str, nn.Module], include_grouped: bool) -> dict[str, str]:
    """Default reasons by module name, for layers of a prunable kind."""
    reasons: dict[str, str] = {}
    first = {
        next((name for name, module in modules.items() if isinstance(module, kind)), None) for kind in _CONVOLUTIONS
    }
    heads = set().union(*(_heads(module) for module in modules.values()))
    stems = [(name, pattern) for name, module in modules.items() for pattern in _timm_stems(module)]
    of_experts = routers(modules)
    adapters = [
        f"{name}.{part}."
        for name, module in modules.items()
        for part in getattr(type(module), "adapter_layer_names", ())  # of peft's layers
    ]
    for name, module in modules.items():
        if module in heads:
            reasons[name] = "output head"
        elif any(name.startswith(adapter) for adapter in adapters):
            reasons[name] = "adapter: trained, not pruned"
        elif module in of_experts:
            reasons[name] = "router"
        elif isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels:
            reasons[name] = "depthwise convolution"
        elif isinstance(module, _CONVOLUTIONS) and module.groups > 1 and not include_grouped and kind_of(module):
            reasons[name] = "grouped convolution: include_grouped=True prunes each group"
        elif isinstance(module, _CONVOLUTIONS) and name in first and module.in_channels <= _IMAGE_CHANNELS:
            reasons[name] = f"stem: reads the raw {'image' if isinstance(module, nn.Conv2d) else 'signal'}"
        elif _STEM.search(name) or any(
            name.startswith(prefix) and pattern.match(name[len(prefix) :].lstrip(".")) for prefix, pattern in stems
        ):
            reasons[name] = "stem or patch embedding"
    return reasons


def _heads(module: nn.Module) -> set[nn.Module]:
    """Modules that belong to the output head which this (sub)model declares."""
    tops: list[Any] = []
    if callable(get_output_embeddings := _method(module, "get_output_embeddings")):
        tops.append(get_output_embeddings())
    if callable(get_classifier := _method(module, "get_classifier")):
        classifier = get_classifier()
        tops.extend(classifier if isinstance(classifier, tuple | list) else [classifier])
    body = module.base_model if hasattr(type(module), "base_model") else None
    if tops and isinstance(body, nn.Module) and body is not module:  # a transformers model with a task on top
        tops.extend(child for child in module.children() if child is not body)
    return {inner for top in tops if isinstance(top, nn.Module) for inner in top.modules()}


def _method(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A method of the module's own class: a wrapper that hands on every attribute does not have it."""
    return getattr(module, name) if hasattr(type(module), name) else None


def _timm_stems(module: nn.Module) -> list[re.Pattern[str]]:
    """How a timm model itself names its stem, as expressions that match at the start of a parameter's name."""
    if not callable(group_matcher := _method(module, "group_matcher")):
        return []
    groups = group_matcher(coarse=False)
    stem = groups.get("stem", ()) if isinstance(groups, Mapping) else ()  # a few give a function instead
    return [re.compile(pattern) for pattern in ([stem] if isinstance(stem, str) else stem) if isinstance(pattern, str)]
