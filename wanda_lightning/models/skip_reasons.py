"""Why a matrix is left dense: embeddings, heads, routers and stems; and what the report says about other matrices."""

import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.utils import parametrize

from wanda_lightning.models.expert_stacks import Modules, routers, stacked_experts
from wanda_lightning.models.layers import layer_kinds
from wanda_lightning.models.quantized import quantizer
from wanda_lightning.models.task import own_head

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_STEM = re.compile(r"(^|\.)((conv_)?stem|patch_embed(ding)?s?|patch_embedder)(\.|$)")
# A first convolution with at most so many input channels reads the raw image or signal.
_IMAGE_CHANNELS = 4


class SkipReason(StrEnum):
    """Reasons to leave a matrix dense."""

    ADAPTER = "adapter"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    ROUTER = "router"
    STEM = "stem"
    TIED = "tied"
    DEPTHWISE = "depthwise"
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


class Reason(NamedTuple):
    """A reason to skip a matrix, with the words for the report."""

    kind: SkipReason
    detail: str


def default_reasons(modules: Modules) -> dict[str, Reason]:
    """Return the reasons to skip the weights of modules by default, by module name."""
    heads = set()
    timm_stems: list[str] = []
    adapters = []
    for name, module in modules.items():
        heads.update(_heads(module))
        timm_stems += _timm_stems(name, module, modules)
        # Layers of peft name their adapters.
        inside = getattr(type(module), "adapter_layer_names", ())
        adapters += [f"{name}.{adapter}." for adapter in inside]
    routing = routers(modules)
    raw = _first_convolutions(modules)

    def reason_for(name: str, module: Module) -> Reason | None:
        if module in heads:
            return Reason(SkipReason.OUTPUT_HEAD, "output head")
        if name.startswith(tuple(adapters)):
            return Reason(SkipReason.ADAPTER, "adapter: trained, not pruned")
        if module in routing:
            return Reason(SkipReason.ROUTER, "router")
        if isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels:
            return Reason(SkipReason.DEPTHWISE, "depthwise convolution")
        if module in raw:
            return Reason(SkipReason.STEM, "stem: reads the raw image or signal")
        if _STEM.search(name) or name in timm_stems:
            return Reason(SkipReason.STEM, "stem or patch embedding")
        if isinstance(module, EMBEDDINGS):
            return Reason(SkipReason.EMBEDDING, "embedding")
        return None

    reasons = {name: reason_for(name, module) for name, module in modules.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _first_convolutions(modules: Modules) -> set[Module]:
    """Return the first convolution of each kind if it reads the raw image or signal."""
    first = set[Module]()
    for kind in _CONVOLUTIONS:
        for module in modules.values():
            if isinstance(module, kind):
                if module.in_channels <= _IMAGE_CHANNELS:
                    first.add(module)
                break
    return first


def _heads(module: Module) -> set[Module]:
    """Return the modules of the output head that a model or submodel declares."""
    tops = []
    if callable(_method(module, "get_output_embeddings")):
        tops.append(own_head(module))
    get_classifier = _method(module, "get_classifier")
    if callable(get_classifier):
        classifier = get_classifier()
        tops += classifier if isinstance(classifier, tuple | list) else [classifier]

    # A model of transformers with a head: whatever lies beside its body belongs to the head.
    body = module.base_model if hasattr(type(module), "base_model") else None
    if tops and isinstance(body, Module) and body is not module:
        tops += [child for child in module.children() if child is not body]
    return {inner for top in tops if isinstance(top, Module) for inner in top.modules()}


def _method(module: Module, name: str) -> Callable[..., Any] | None:
    """Return a method that the module's class defines; a wrapper that forwards attribute access does not count."""
    return getattr(module, name) if hasattr(type(module), name) else None


def _timm_stems(model_name: str, model: Module, modules: Modules) -> Iterator[str]:
    """Yield the names of the modules in the stem of a model of timm, which declares them by regular expressions."""
    group_matcher = _method(model, "group_matcher")
    if not callable(group_matcher):
        return
    groups = group_matcher(coarse=False)
    if not isinstance(groups, Mapping):  # a few models return a function
        return

    stem = groups.get("stem", ())
    patterns = [stem] if isinstance(stem, str) else stem
    for name in modules:
        if name.startswith(model_name):
            inner_name = name[len(model_name) :].lstrip(".")
            # They match the start of a parameter's name.
            if any(isinstance(p, str) and re.match(p, inner_name) for p in patterns):
                yield name


def why_packed(weight: Tensor, module: Module) -> str:
    """Return why packed or quantized weights stay as they are. Pruning refuses them unless the user skips them."""
    library = quantizer(module, weight)
    if library:
        kinds = f"{type(module).__name__}, {type(weight).__name__}"
        return f"quantized by {library} ({kinds}): prune first, then quantize"
    form = str(weight.dtype).removeprefix("torch.")
    if weight.layout is not torch.strided:
        form = str(weight.layout)
    return f"{form} weights of type {type(weight).__name__} cannot be pruned in place"


def why_unsupported(module: Module, parameter_name: str) -> str:
    """Return why a parameter of two or more dimensions is not the weight of a supported layer."""
    kind = type(module).__name__
    if isinstance(module, parametrize.ParametrizationList):
        by = ", ".join(type(parametrization).__name__ for parametrization in module)
        return f"parametrized by {by}: make it an ordinary weight first, with parametrize.remove_parametrizations"

    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            how = "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
            return f"recomputed in each forward by {type(hook).__name__}: make it an ordinary weight first, with {how}"

    if parameter_name == "weight":
        for known in layer_kinds().values():
            if isinstance(module, known.layer_type):
                return f"{type(module).__module__}.{kind} overrides the forward of {known.layer_type.__name__}"

    if parameter_name in stacked_experts(module):
        return f"{kind} does not show which dimension of the experts' matrices in {parameter_name} is the input"
    return f"{parameter_name} of {kind} is not the weight of a supported layer ({', '.join(layer_kinds())})"


def has_hooks(module: Module) -> bool:
    """Whether other code runs before or after the forward of a module."""
    return bool(module._forward_pre_hooks or module._forward_hooks)
