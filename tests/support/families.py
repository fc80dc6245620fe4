"""Prune one small random model of every family that transformers and timm have, check it, and write docs/models.md.

    python tests/families.py --kind causal --only 'qwen*' --resume families.json --write

A family is a configuration class (transformers) or a module (timm). Of each, one model is built tiny with random
weights and pruned to 0.5 and to 2:4 at sequential `block` and `layer` (timm: `model` too). It passes if every matrix
inside its blocks has exactly its sparsity or was skipped with a reason, no skipped weight changed, outputs are finite,
and `block` gives, in float64, the masks of a slow procedure with statistics of its own (`slow_prune`).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from support import tiny
from support.zoo import _build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from wanda_lightning import PruningReport, prune
from wanda_lightning.models import Layer, find_layers
from wanda_lightning.report import versions

aten = torch.ops.aten
TOKENS, IMAGE, PATCH = 24, 32, 8
FIRST_WORD = 8  # the ids before it are padding, start, end, images
KINDS = {
    "causal": "Language models: transformers' `MODEL_FOR_CAUSAL_LM_MAPPING`",
    "other": "Encoders, encoder-decoders, vision and vision-language models of transformers",
    "timm": "Image models: the smallest of each module of `timm.list_models()`",
}


@dataclass(frozen=True)
class Family:
    """One model for all of its kin.

    Attributes:
        kind: One of `KINDS`.
        name: Configuration's model type, or timm's module.
        model: The class, or timm's name of the model.
        build: The model, in eval mode and float32, with the same weights every time.
        batches: Small calibration batches for it.
    """

    kind: str
    name: str
    model: str
    build: Callable[[], nn.Module]
    batches: Callable[[nn.Module], list[Any]]

    @property
    def granularities(self) -> tuple[str, ...]:
        return ("block", "layer", "none") if self.kind == "timm" else ("block", "layer")


@dataclass
class Result:
    """What a family came to.

    Attributes:
        status: `passes`, `fails`, or `cannot be built here`.
        cause: The error's first line, where it does not pass.
        sparsity: Of the pruned layers, at 0.5 and `block`.
        coverage: Pruned parameters over those of all matrices inside the blocks that a batch reaches.
        left_out: Share of those that are left dense, by reason.
        slow: The dtype in which `block` equals the slow procedure.
        seconds: For everything.
    """

    kind: str
    name: str
    model: str
    status: str = "passes"
    cause: str = ""
    sparsity: float = 0.0
    coverage: float = 0.0
    left_out: dict[str, float] = field(default_factory=dict)
    slow: str = ""
    seconds: float = 0.0


class CannotBuild(Exception):
    """The installed versions have no such model for us."""


# ---- the families


def families(kinds: Sequence[str] = tuple(KINDS), only: Sequence[str] = ("*",)) -> Iterator[Family]:
    """Those of some kinds whose name a glob matches; nothing is built yet."""
    chosen = partial(_matches, globs=only)
    if "causal" in kinds:
        for config_class, model_class in tiny.config_classes(MODEL_FOR_CAUSAL_LM_MAPPING).items():
            if chosen(config_class.model_type):
                yield causal(config_class, model_class)
    if "other" in kinds:
        yield from (other(name) for name in OTHERS if hasattr(hf, name) and chosen(name))
    if "timm" in kinds:
        for module, names in sorted(timm_modules().items()):
            if chosen(module):
                yield of_timm(min(names, key=_size))


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def causal(config_class: type[hf.PreTrainedConfig], model_class: Any) -> Family:
    """A language model that is given text alone."""

    def configure() -> hf.PreTrainedConfig:
        config = tiny.tiny(config_class)
        if not isinstance(config, model_class.config_class):  # the mapping names the language part of several
            parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
            config = parts[0] if parts else config
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        return config

    model_type = config_class.model_type
    make = partial(_build, partial(_of_transformers, model_class, configure))
    return Family("causal", model_type, model_class.__name__, make, _SPECIAL_BATCHES.get(model_type, _text))


def other(name: str) -> Family:
    """One of `OTHERS`."""
    model_class, how = getattr(hf, name), OTHERS[name]
    make = partial(
        _build, partial(_of_transformers, model_class, lambda: tiny.tiny(model_class.config_class, **how.more))
    )
    return Family("other", name, name, make, how.batches)


def _of_transformers(model_class: Any, configure: Callable[[], hf.PreTrainedConfig]) -> nn.Module:
    config = configure()
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(copy.deepcopy(config)).parameters())
    if size > 10_000_000:
        raise CannotBuild(f"the smallest that its configuration gives has {size:,} parameters")
    model = model_class._from_config(config)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model


@cache
def timm_modules() -> dict[str, list[str]]:
    """Names of models by the module that makes them."""
    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        modules.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    return modules


def of_timm(name: str) -> Family:
    """A model of timm with as few blocks and on as small images as it takes."""

    @cache
    def choice() -> tuple[dict[str, Any], int]:
        fewer = _fewer_blocks(name)
        return _on_small_images(name, fewer) or _on_small_images(name, {}) or ({}, _image_size(name))

    def images(model: nn.Module) -> list[Any]:
        random, size = torch.Generator().manual_seed(1), choice()[1]
        return [(torch.randn(n, 3, size, size, generator=random), torch.arange(n)) for n in (2, 1)]

    module = timm.models._registry._model_to_module[name]
    make = partial(_build, lambda: timm.create_model(name, num_classes=16, **choice()[0]))
    return Family("timm", module, name, make, images)


def _size(name: str, **more: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=16, **more).parameters())


def _fewer_blocks(name: str) -> dict[str, Any]:
    whole = _size(name)
    for more in [{"depth": 2}, *({"depths": (n,) * k} for k in (4, 3) for n in (2,)), {"layers": (1, 1, 1, 1)}]:
        try:
            if whole > 2_000_000 and _size(name, **more) < whole:
                return more
        except Exception:  # it has no such argument, or its stages are not as many
            continue
    return {}


def _image_size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


def _on_small_images(name: str, more: dict[str, Any]) -> tuple[dict[str, Any], int] | None:
    usual = _image_size(name)
    for size in sorted({size for size in (64, 96, 128, 160, 192, 224) if size < usual} | {usual}):
        for sized in ({**more, "img_size": size}, more):
            try:
                with torch.device("meta"), torch.no_grad():
                    timm.create_model(name, num_classes=16, **sized).eval()(torch.zeros(1, 3, size, size))
            except Exception:  # another size, then
                continue
            return sized, size
    return None


# ---- batches


def _ids(samples: int, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed + samples)
    return torch.randint(FIRST_WORD, tiny.VOCABULARY, (samples, tokens), generator=random)


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0]))


def _text(model: nn.Module) -> list[Any]:
    return [{"input_ids": _ids(samples)} for samples in (2, 3)]


def _codebooks(model: nn.Module) -> list[Any]:
    return [{"input_ids": _ids(samples * model.config.num_codebooks)} for samples in (2, 3)]


def _from_a_target(model: nn.Module) -> list[Any]:
    """What a drafting model is given by the model that it drafts for."""
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = {a.layer_type: (tiny.HEADS // a.num_key_value_groups, TOKENS, a.head_dim) for a in attentions}
    return [
        {
            "inputs_embeds": _normal(samples, 1, 2 * model.config.backbone_hidden_size),
            "position_ids": torch.full((samples, 1), TOKENS),
            "shared_kv_states": {
                kind: tuple(_normal(samples, *shape, seed=seed) for seed in (2, 3)) for kind, shape in heads.items()
            },
        }
        for samples in (2, 3)
    ]


_SPECIAL_BATCHES: dict[str, Callable[[nn.Module], list[Any]]] = {
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "gemma4_assistant": _from_a_target,
    "gemma4_unified_assistant": _from_a_target,
}


def _text_pairs(model: nn.Module) -> list[Any]:
    return [{"input_ids": _ids(n), "decoder_input_ids": _ids(n, 16, seed=5)} for n in (2, 3)]


def _images(model: nn.Module) -> list[Any]:
    return [{"pixel_values": _normal(samples, 3, IMAGE, IMAGE)} for samples in (2, 3)]


def _captions(model: nn.Module) -> list[Any]:
    return [{"input_ids": _ids(n), "pixel_values": _normal(n, 3, IMAGE, IMAGE)} for n in (2, 3)]


def _images_in_text(model: nn.Module) -> list[Any]:
    """As many image tokens as the model makes of one image, in front of the text."""
    image = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    places = int((IMAGE // PATCH * getattr(model.config, "downsample_ratio", 1)) ** 2)
    return [
        {
            "input_ids": torch.cat([torch.full((n, places), image), _ids(n)], 1),
            "pixel_values": _normal(n, 3, IMAGE, IMAGE),
        }
        for n in (2, 3)
    ]


def _patches_in_text(model: nn.Module) -> list[Any]:
    """Qwen-VL: images are patches in one row, with the grid that they form."""
    vision, side = model.config.vision_config, IMAGE // PATCH
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    places = (side // vision.spatial_merge_size) ** 2
    batches = []
    for n in (2, 3):
        ids = torch.cat([torch.full((n, places), model.config.image_token_id), _ids(n)], 1)
        batches.append(
            {
                "input_ids": ids,
                "pixel_values": _normal(n * side**2, width),
                "image_grid_thw": torch.tensor([[1, side, side]] * n),
                "mm_token_type_ids": (ids == model.config.image_token_id).long(),
            }
        )
    return batches


def _spectra(model: nn.Module) -> list[Any]:
    """Whisper: twice as many frames as the encoder has positions."""
    frames = 2 * model.config.max_source_positions
    mels = model.config.num_mel_bins
    return [{"input_features": _normal(n, mels, frames), "decoder_input_ids": _ids(n, 16)} for n in (2, 3)]


def _waves(model: nn.Module) -> list[Any]:
    return [{"input_values": _normal(samples, 4000)} for samples in (2, 3)]


@dataclass(frozen=True)
class Other:
    """How a model is fed that is no causal language model, and what its configuration needs more."""

    batches: Callable[[nn.Module], list[Any]] = _text
    more: dict[str, Any] = field(default_factory=dict)


OTHERS: dict[str, Other] = {
    **{
        name: Other(_text_pairs)
        for name in (
            "T5ForConditionalGeneration",
            "MT5ForConditionalGeneration",
            "UMT5ForConditionalGeneration",
            "LongT5ForConditionalGeneration",
            "SwitchTransformersForConditionalGeneration",
            "BartForConditionalGeneration",
            "MBartForConditionalGeneration",
            "PegasusForConditionalGeneration",
            "MarianMTModel",
            "BlenderbotForConditionalGeneration",
            "M2M100ForConditionalGeneration",
            "LEDForConditionalGeneration",
            "ProphetNetForConditionalGeneration",
        )
    },
    "WhisperForConditionalGeneration": Other(_spectra),
    **{
        name: Other(_text)
        for name in (
            "BertForMaskedLM",
            "BertForSequenceClassification",
            "RobertaForMaskedLM",
            "XLMRobertaForMaskedLM",
            "AlbertForMaskedLM",
            "DistilBertForMaskedLM",
            "ElectraForMaskedLM",
            "DebertaForMaskedLM",
            "DebertaV2ForMaskedLM",
            "ModernBertForMaskedLM",
            "MPNetForMaskedLM",
            "LongformerForMaskedLM",
            "FunnelForMaskedLM",
            "FNetForMaskedLM",
            "ConvBertForMaskedLM",
            "MobileBertForMaskedLM",
            "SqueezeBertForMaskedLM",
            "NystromformerForMaskedLM",
        )
    },
    **{
        name: Other(_images)
        for name in (
            "ViTForImageClassification",
            "DeiTForImageClassification",
            "BeitForImageClassification",
            "Dinov2ForImageClassification",
            "Dinov2WithRegistersForImageClassification",
            "DINOv3ViTModel",
            "SwinForImageClassification",
            "Swinv2ForImageClassification",
            "ConvNextForImageClassification",
            "ConvNextV2ForImageClassification",
            "ResNetForImageClassification",
            "RegNetForImageClassification",
            "MobileNetV2ForImageClassification",
            "MobileViTForImageClassification",
            "SegformerForImageClassification",
            "PvtForImageClassification",
            "PoolFormerForImageClassification",
            "CLIPVisionModel",
            "SiglipVisionModel",
            "IJepaForImageClassification",
        )
    },
    **{name: Other(_captions) for name in ("CLIPModel", "SiglipModel", "BlipForConditionalGeneration", "ViltModel")},
    **{
        name: Other(_images_in_text)
        for name in (
            "LlavaForConditionalGeneration",
            "PaliGemmaForConditionalGeneration",
            "InternVLForConditionalGeneration",
        )
    },
    **{
        name: Other(_patches_in_text)
        for name in (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
        )
    },
    **{name: Other(_waves) for name in ("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC")},
}


# ---- the checks


def run(model: nn.Module, batch: Any) -> Any:
    """The plain forward that `prune` makes of such a batch."""
    with torch.no_grad():
        return model(**batch) if isinstance(batch, Mapping) else model(batch[0])


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter with two dimensions or more, a `weight` by its module, a tied one under each."""
    return {
        f"{module_name}.{name}".removesuffix(".weight").lstrip("."): parameter
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def _finite(output: Any) -> bool:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert leaves, "the model has no output to look at"
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def check(family: Family, slowly: bool = True) -> Result:
    """Prune it in all ways.

    Raises:
        AssertionError: If a promise is broken.
        CannotBuild: If there is no such model, or its plain forward pass fails.
    """
    result = Result(family.kind, family.name, family.model)
    try:
        dense = family.build()
        for batch in family.batches(dense):
            finite = _finite(run(dense, batch))
    except TimeoutError:
        raise
    except Exception as error:
        raise CannotBuild(_first_line(error)) from error
    assert finite, "outputs of the dense model are not finite"
    for sequential in family.granularities:
        for pattern in ("unstructured", "2:4"):
            model = copy.deepcopy(dense)
            report = prune(model, family.batches(model), 0.5, pattern=pattern, sequential=sequential, progress=False)
            _verify(model, dense, report, pattern)
            assert all(_finite(run(model, batch)) for batch in family.batches(model)), f"not finite: {pattern}"
            if (sequential, pattern) == ("block", "unstructured"):
                result.sparsity = report.sparsity
                result.coverage, result.left_out = _coverage(dense, report, family.batches(dense))
    if slowly:
        result.slow = _compare(dense, family.batches(dense))
    return result


def _verify(model: nn.Module, dense: nn.Module, report: PruningReport, pattern: str) -> None:
    layers = {layer.name: layer for layer in find_layers(model).layers}
    pruned = {layer.name: layers[layer.name] for layer in report.layers}
    listed = {*pruned, *(matrix.name for matrix in report.skipped)}
    lost = [name for name in _matrices(model) if not any(f"{other}.".startswith(f"{name}.") for other in listed)]
    assert not lost, f"neither pruned nor skipped: {lost[0]}"
    assert all(matrix.detail for matrix in report.skipped)
    for name, layer in pruned.items():
        zeros = layer.read() == 0
        if pattern == "2:4":
            assert zeros.unflatten(1, (-1, 4)).sum(2).eq(2).all(), f"not 2:4: {name}"
        else:
            assert zeros.sum(1).eq(int(zeros.shape[1] * 0.5)).all(), f"not 0.5 of each row: {name}"
    written = {id(layer.parameter) for layer in pruned.values()}
    before = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        kept = parameter != 0 if id(parameter) in written else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[kept], before[name][kept]), f"{name} changed"
    for (name, buffer), other in zip(model.named_buffers(), dense.buffers(), strict=True):
        assert torch.equal(buffer, other) or buffer.isnan().any(), f"buffer {name} changed"


# ---- coverage

_OUTSIDE = ("embedding", "output head", "stem", "tied to")


def _coverage(model: nn.Module, report: PruningReport, batches: list[Any]) -> tuple[float, dict[str, float]]:
    """Of the matrices inside the blocks that a batch reaches: which share is pruned, and why the rest is not."""
    blocks, idle = _reached_blocks(model, batches)

    def counts(name: str) -> bool:
        return _inside(name, blocks) and not _inside(name, idle)

    skipped = {matrix.name: matrix.detail for matrix in report.skipped if not matrix.detail.startswith(_OUTSIDE)}
    sizes: Counter[str] = Counter()
    for layer in report.layers:
        sizes["pruned"] += layer.size if counts(layer.name) else 0
    found = _matrices(model)
    for name, reason in skipped.items():
        parameter = found.get(name)
        if parameter is not None and counts(name):
            sizes[reason] += parameter.numel()
    total = sum(sizes.values())
    return sizes.pop("pruned") / total if total else 0.0, {reason: n / total for reason, n in sizes.most_common()}


def _inside(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}." if module else "") for module in modules)


def _reached_blocks(model: nn.Module, batches: list[Any]) -> tuple[set[str], set[str]]:
    """Outermost repeated parts, or the whole model if they hold less than half of it; and parts that no batch enters.

    A layer alone is no part: one whose weight is read past its forward is left out in earnest.
    """
    modules = dict(model.named_modules())
    called: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, name=n: called.add(name)) for n, m in modules.items()]
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    parts = {name for name, module in modules.items() if next(module.children(), None) is not None}
    idle = {name for name in parts if not any(_inside(other, {name}) for other in called)}
    repeated = {
        f"{name}.{child}".lstrip(".")
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child, _ in module.named_children()
    } | {name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)}
    sizes = {name: p.numel() for name, p in _matrices(model).items() if "embed" not in name and not _inside(name, idle)}
    inside = sum(n for name, n in sizes.items() if _inside(name, repeated))
    return repeated if inside >= sum(sizes.values()) / 2 else {""}, idle


# ---- the slow procedure


def _compare(dense: nn.Module, batches: list[Any]) -> str:
    """In which dtype the masks of sequential `block` equal those of the slow procedure.

    Raises:
        AssertionError: If they differ.
    """
    model, wide = copy.deepcopy(dense), tree_map_only(Tensor, _double, batches)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products are not overheard, and have no float64
    narrow = copy.deepcopy(model)
    try:
        model.double()
        for batch in wide:
            run(model, batch)
    except RuntimeError:  # something in it is float32 whatever the weights are
        model, wide = narrow, batches
    batches, dtype = wide, next(model.parameters()).dtype
    slow = copy.deepcopy(model)
    prune(model, batches, 0.5, progress=False)
    slow_prune(slow, batches)
    expected = dict(slow.named_parameters())
    other = {name: int(((p == 0) != (expected[name] == 0)).sum()) for name, p in model.named_parameters()}
    if worst := [name for name, count in other.items() if count]:
        counts = f"{sum(other.values())} of {sum(int((p == 0).sum()) for p in model.parameters())}"
        raise AssertionError(f"{dtype}: {counts} zeros are not those of the slow procedure, in {worst[0]} first")
    return str(dtype).removeprefix("torch.")


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def slow_prune(model: nn.Module, batches: list[Any], sparsity: float = 0.5) -> None:
    """For each unit: a forward of each batch through the model as pruned so far, up to it; Wanda by plain code; zero.

    What enters a matrix is overheard where PyTorch multiplies, below all modules. For a convolution, the sum of x² that
    a weight multiplies is the gradient by that weight of the summed output, for the input x².
    """
    units = find_layers(model, "block").units
    for unit in _in_order(model, units, batches):
        squares: dict[str, Tensor] = {}
        overheard = _Overheard([layer for layer in unit.layers if _is_matrix(layer)])
        for batch in batches:
            with _Multiplications(overheard.on_product):
                _add_squares(model, unit, batch, squares)
        for layer in unit.layers:
            if _is_matrix(layer):
                overheard.zero_smallest(layer, sparsity)
            elif layer.name in squares:
                _zero_smallest(layer, squares[layer.name].sqrt(), sparsity)


def _parameter(layer: Layer) -> Tensor:
    return getattr(layer.module, getattr(layer, "parameter_name", "weight"))


def _is_matrix(layer: Layer) -> bool:
    """It, or each expert that lies in its parameter."""
    return getattr(layer, "expert", None) is not None or _parameter(layer).ndim == 2


class _Multiplications(TorchDispatchMode):
    """Hears of both factors of each product of matrices, and where in memory the second one starts."""

    def __init__(self, on_product: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._on_product = on_product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            x, weight = args[-2:]
            if weight.ndim == 3 and weight.stride(0) == 0:  # one for all
                x, weight = x.flatten(0, 1), weight[0]
            self._on_product(weight.untyped_storage().data_ptr(), x.detach(), weight)
        return func(*args, **(kwargs or {}))


class _Overheard:
    """Sums of x² over the tokens that are multiplied with each matrix, in whichever layout it is stored.

    Where few tokens come to an expert, those of all count: `prune(min_expert_tokens=32)`.
    """

    def __init__(self, layers: Sequence[Layer], enough: int = 32) -> None:
        self._enough = enough
        self._parameters = {p.data_ptr(): p if p.ndim == 3 else p[None] for p in map(_parameter, layers)}
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: Counter[tuple[int, int]] = Counter()
        self._columns: dict[int, bool] = {}

    def on_product(self, start: int, x: Tensor, weight: Tensor) -> None:
        if start not in self._parameters:
            return
        one = self._parameters[start][0]
        self._columns[start] = (weight.shape[-2], weight.stride(-2)) == (one.shape[0], one.stride(0))
        first = weight.storage_offset() // one.numel()
        for place, tokens in enumerate(x if weight.ndim == 3 else [x]):
            rows = tokens[tokens.any(1)]  # one that is all zero is another expert's token
            key = (start, first + place)
            self._sums[key] = self._sums.get(key, 0) + rows.square().sum(0)
            self._counts[key] += len(rows)

    @torch.no_grad()
    def zero_smallest(self, layer: Layer, sparsity: float) -> None:
        weight, expert = _parameter(layer), getattr(layer, "expert", None)
        start = weight.data_ptr()
        if expert is None and (start, 0) not in self._sums:
            return
        if expert is None or self._counts[start, expert] >= self._enough:
            total = self._sums[start, expert or 0]
        else:
            total = sum(value for (parameter, _), value in self._sums.items() if parameter == start)
        matrix = self._parameters[start].detach()[expert or 0]
        rows = matrix.t() if self._columns[start] else matrix
        for row, score in zip(rows, rows.abs() * total.sqrt(), strict=True):
            row[score.argsort(stable=True)[: int(len(row) * sparsity)]] = 0


def _in_order(model: nn.Module, units: Sequence[Any], batches: list[Any]) -> list[Any]:
    """Next is the first unit, in walk order, that is next for any of the batches."""
    routes = []
    for batch in batches:
        route: list[int] = []
        handles = [
            unit.module.register_forward_pre_hook(lambda *_, index=index, route=route: route.append(index))
            for index, unit in enumerate(units)
        ]
        alone = {
            _parameter(unit.layers[0]).data_ptr(): index
            for index, unit in enumerate(units)
            if unit.layers[0].module is unit.module
        }

        def reached(start: int, *_: Tensor, alone: dict[int, int] = alone, route: list[int] = route) -> None:
            if start in alone:
                route.append(alone[start])

        with _Multiplications(reached):
            run(model, batch)
        for handle in handles:
            handle.remove()
        routes.append(list(dict.fromkeys(route)))
    order: list[int] = []
    while any(routes):
        order.append(min(route[0] for route in routes if route))
        routes = [[index for index in route if index != order[-1]] for route in routes]
    return [units[index] for index in order]


class _Enough(Exception):
    """The unit has run; what comes after it in the model is of no interest."""


def _add_squares(model: nn.Module, unit: Any, batch: Any, squares: dict[str, Tensor]) -> None:
    """Add what a batch brings to the convolutions of a unit, the first time that it gets there."""

    def reader(layer: Layer) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.enable_grad():
                module.weight.requires_grad_(True)
                (gradient,) = torch.autograd.grad(module.forward(x.detach().square()).sum(), module.weight)
            squares[layer.name] = squares.get(layer.name, 0) + gradient

        return read

    def stop(*_: object) -> None:
        raise _Enough

    images = [layer for layer in unit.layers if not _is_matrix(layer)]
    handles = [layer.module.register_forward_pre_hook(reader(layer), with_kwargs=True) for layer in images]
    handles.append(unit.module.register_forward_hook(stop))
    with suppress(_Enough):
        run(model, batch)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _zero_smallest(layer: Layer, norms: Tensor, sparsity: float) -> None:
    weight = layer.module.weight
    # Rows first, then kernel positions, then channels: where scores are equal (padding alone), the lower column goes.
    order = (0, *range(2, weight.ndim), 1)
    scores = (weight.abs() * norms).permute(order)
    zeros = torch.zeros_like(scores.flatten(1), dtype=torch.bool)
    for row, values in enumerate(scores.flatten(1)):
        zeros[row, values.argsort(stable=True)[: int(len(values) * sparsity)]] = True
    weight.permute(order)[zeros.unflatten(1, scores.shape[1:])] = 0


# ---- the table


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{Path(where.filename).name}:{where.lineno}"
    return f"{type(error).__name__}: {text[0][:300] if text else 'without a message'} ({line})"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Of the processor, whatever else it does meanwhile."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(family: Family, seconds: int, slowly: bool = True) -> Result:
    """`check`, with whatever goes wrong as a result."""
    result = Result(family.kind, family.name, family.model)
    started = time.process_time()
    try:
        with _time_limit(seconds):
            result = check(family, slowly)
    except CannotBuild as error:
        result.status, result.cause = "cannot be built here", str(error)
    except Exception as error:
        result.status, result.cause = "fails", _first_line(error)
    result.seconds = time.process_time() - started
    return result


def document(results: Sequence[Result]) -> str:
    """docs/models.md."""
    used = {name: version.partition("+")[0] for name, version in versions().items()}
    lines = [
        "# Which models can be pruned",
        "",
        "One small random model of every family is built, pruned to 0.5 and to 2:4 at `block` and `layer` (timm: "
        "`model` too) and checked: each matrix inside the blocks has exactly its sparsity or was skipped with a "
        "reason, skipped weights did not change, outputs are finite, and `block` gives the masks of a slow, "
        f"independent procedure. Written by `python tests/families.py --write` with torch {used['torch']}, "
        f"transformers {used['transformers']} and timm {used['timm']}.",
        "",
        "Coverage: pruned parameters over those of all matrices inside the blocks that a batch reaches, without "
        "embeddings, output heads and stems. Slow: the dtype in which the masks equal the slow procedure's. Seconds "
        "are for all of it, on one CPU thread. Sizes are tiny, so that small matrices weigh more than in real models.",
        "",
        "| | families | pass | fail | cannot be built here | median coverage | coverage below 80 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = [kind for kind in KINDS if any(result.kind == kind for result in results)]
    lines += [_summary(KINDS[kind], [r for r in results if r.kind == kind]) for kind in kinds]
    lines += ["", share(results)]
    for kind in kinds:
        own = sorted((result for result in results if result.kind == kind), key=lambda result: result.name)
        lines += ["", f"## {KINDS[kind]}", ""]
        if bad := [result for result in own if result.status != "passes"]:
            lines += ["| family | class | | cause |", "| --- | --- | --- | --- |"]
            lines += [f"| {r.name} | {r.model} | {r.status} | {_cell(r.cause)} |" for r in bad]
            lines += [""]
        lines += ["| family | class | sparsity | coverage | left dense | slow | seconds |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_row(result) for result in own if result.status == "passes"]
    return "\n".join(lines) + "\n"


def share(results: Sequence[Result]) -> str:
    """The sentence that is printed last."""
    built = [result for result in results if result.status != "cannot be built here"]
    passed = [result for result in built if result.status == "passes"]
    return f"{len(passed)} of {len(built)} families that can be built pass: {len(passed) / max(1, len(built)):.1%}."


def _summary(title: str, results: Sequence[Result]) -> str:
    counts = Counter(result.status for result in results)
    coverages = sorted(result.coverage for result in results if result.status == "passes")
    median = f"{coverages[len(coverages) // 2]:.0%}" if coverages else ""
    low = sum(coverage < 0.8 for coverage in coverages)
    each = (counts["passes"], counts["fails"], counts["cannot be built here"])
    return f"| {title} | {len(results)} | {' | '.join(map(str, each))} | {median} | {low} |"


def _row(result: Result) -> str:
    left = "; ".join(
        f"{share:.0%} {_cell(reason)}" for reason, share in list(result.left_out.items())[:2] if share > 0.005
    )
    shown = (f"{result.sparsity:.1%}", f"{result.coverage:.0%}", left, result.slow, f"{result.seconds:.1f}")
    return f"| {result.name} | {result.model} | {' | '.join(shown)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="names of families")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--resume", type=Path, help="JSON of results: those in it are not made again")
    parser.add_argument("--again", action="store_true", help="make those that did not pass again")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    parser.add_argument("--seconds", type=int, default=300, help="of the processor, for each family at most")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    logging.getLogger("wanda_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = (
        json.loads(args.resume.read_text()) if args.resume and args.resume.exists() else {}
    )
    if args.again:
        results = {key: value for key, value in results.items() if value["status"] == "passes"}

    def keep(result: Result) -> None:
        results[f"{result.kind}/{result.name}"] = asdict(result)
        if args.resume:
            args.resume.write_text(json.dumps(results, indent=1))

    for kind in args.kind:
        names = [name for name in _names(kind) if _matches(name, args.only) and f"{kind}/{name}" not in results]
        for family in (family for name in names for family in families([kind], [name])):
            # A crash of the process leaves this behind: the next run goes on after it.
            keep(Result(family.kind, family.name, family.model, "fails", "the process crashed"))
            result = examine(family, args.seconds)
            keep(result)
            print(f"{kind:7}{result.name:44}{result.status:10}{result.coverage:5.0%}{result.seconds:7.1f} s", end="")
            print(f"  {result.slow}{result.cause}", flush=True)
    chosen = [Result(**value) for value in results.values() if value["kind"] in args.kind]
    chosen = [result for result in chosen if _matches(result.name, args.only)]
    if args.write:
        path = Path(__file__).parents[2] / "docs" / "models.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(document(chosen), encoding="utf-8")
    print(share(chosen))


def _names(kind: str) -> list[str]:
    if kind == "causal":
        return [config_class.model_type for config_class in tiny.config_classes(MODEL_FOR_CAUSAL_LM_MAPPING)]
    return list(OTHERS) if kind == "other" else sorted(timm_modules())


if __name__ == "__main__":
    main()
