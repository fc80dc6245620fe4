"""Prune one small random model of every family in transformers and timm, check it, and write docs/models.md.

    PYTHONPATH=tests python tests/support/families.py --kind causal --only 'qwen*' --resume families.json --write

A family is a configuration class (transformers) or a module (timm). For each one, this script builds a tiny model with
random weights and prunes it to 50 % and to 2:4, with sequential="block" and "layer" (timm models also with "none").
The model passes if every matrix inside its blocks has exactly its sparsity or is skipped with a reason, no skipped
weight changed, all outputs are finite, and the masks for "block" equal, in float64, those of a slow procedure that
computes its own statistics (`slow_prune`).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from support import tiny
from support.zoo import seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from wanda_lightning import PruningReport, prune
from wanda_lightning.models import Layer, Unit, find_layers
from wanda_lightning.report import versions

aten = torch.ops.aten
TOKENS, IMAGE, PATCH = 24, 32, 8
FIRST_WORD = 8  # smaller ids are padding, start, end and image tokens
KINDS = {
    "causal": "Language models: transformers' `MODEL_FOR_CAUSAL_LM_MAPPING`",
    "other": "Encoders, encoder-decoders, vision and vision-language models of transformers",
    "timm": "Image models: the smallest model of each module in `timm.list_models()`",
}


@dataclass(frozen=True)
class Family:
    """One model that represents its family."""

    kind: str  # one of `KINDS`
    name: str  # the model type of the configuration, or the module in timm
    model: str  # the class, or timm's name of the model
    build: Callable[[], nn.Module]  # in eval mode and float32, with the same weights every time
    batches: Callable[[nn.Module], list[Any]]  # small calibration batches for a model
    arguments: Callable[[], dict[str, Any]] = dict  # of `timm.create_model`, beside the name and `num_classes`

    @property
    def ways(self) -> list[tuple[str, str]]:
        """Every choice of `sequential` and `pattern` with which the model is pruned."""
        return list(product(("block", "layer", "none")[: 3 if self.kind == "timm" else 2], ("unstructured", "2:4")))


@dataclass
class Result:
    """The outcome for a family."""

    kind: str
    name: str
    model: str
    cause: str = ""  # the first line of the error, if it does not pass
    status: str = "fails"  # or `passes`, or `cannot be built here`
    sparsity: float = 0.0  # of the pruned layers, at 0.5 and `block`
    coverage: float = 0.0  # pruned parameters divided by those of all matrices inside the blocks that a batch reaches
    left_out: dict[str, float] = field(default_factory=dict)  # the fraction of those that stay dense, by reason
    slow: str = ""  # the dtype in which `block` equals the slow procedure
    seconds: float = 0.0  # CPU time for all of it

    def __str__(self) -> str:
        return f"{self.status:10}{self.coverage:5.0%}  {self.slow}{self.cause}"


class CannotBuild(Exception):
    """The installed versions cannot build the model, or its plain forward pass fails."""


# ---- the families


def names(kind: str) -> list[str]:
    """Return the names of all families of a kind."""
    others = [name for name in OTHERS if hasattr(hf, name)]
    return {"causal": list(_causal()), "other": others, "timm": sorted(_timm())}[kind]


def family(kind: str, name: str) -> Family:
    """Return a family by its name. Nothing is built yet."""
    if kind == "timm":
        return of_timm(min(_timm()[name], key=_size))
    return causal(name) if kind == "causal" else other(name)


@cache
def _causal() -> dict[str, tuple[type[hf.PreTrainedConfig], Any]]:
    """Return the configuration and the first class of each language model, by its model type."""
    return {
        config_class.model_type: (config_class, found[0] if isinstance(found, tuple) else found)
        for config_class, found in MODEL_FOR_CAUSAL_LM_MAPPING.items()
    }


def causal(name: str) -> Family:
    """Return a language model that reads only text."""
    config_class, model_class = _causal()[name]

    def configure() -> hf.PreTrainedConfig:
        config = tiny.tiny(config_class)
        if not isinstance(config, model_class.config_class):  # the mapping names only the language part of some models
            parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
            config = parts[0] if parts else config
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        return config

    return _of_transformers("causal", name, model_class, configure, _SPECIAL_BATCHES.get(name, _text))


def other(name: str) -> Family:
    """Return a family of `OTHERS`."""
    model_class = getattr(hf, name)
    return _of_transformers("other", name, model_class, lambda: tiny.tiny(model_class.config_class), OTHERS[name])


def _of_transformers(
    kind: str,
    name: str,
    model_class: Any,
    configure: Callable[[], hf.PreTrainedConfig],
    batch: Callable[[nn.Module, int], dict[str, Any]],
) -> Family:
    def make() -> nn.Module:
        config = configure()
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class._from_config(copy.deepcopy(config)).parameters())
        if size > 10_000_000:
            raise CannotBuild(f"its smallest configuration has {size:,} parameters")
        model = model_class._from_config(config)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False
        return model

    def batches(model: nn.Module) -> list[Any]:
        return [batch(model, samples) for samples in (2, 3)]

    return Family(kind, name, model_class.__name__, partial(seeded, make), batches)


@cache
def _timm() -> dict[str, list[str]]:
    """Return the names of timm's models by the module that builds them."""
    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        modules.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    return modules


def of_timm(name: str) -> Family:
    """Return a model of timm with as few blocks and with images as small as it accepts."""

    @cache
    def choice() -> tuple[dict[str, Any], int]:
        fewer = _fewer_blocks(name)
        return _on_small_images(name, fewer) or _on_small_images(name, {}) or ({}, _image_size(name))

    def images(model: nn.Module) -> list[Any]:
        random, size = torch.Generator().manual_seed(1), choice()[1]
        return [(torch.randn(n, 3, size, size, generator=random), torch.arange(n)) for n in (2, 1)]

    module = timm.models._registry._model_to_module[name]
    make = partial(seeded, lambda: timm.create_model(name, num_classes=16, **choice()[0]))
    return Family("timm", module, name, make, images, lambda: choice()[0])


def _size(name: str, **more: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=16, **more).parameters())


def _fewer_blocks(name: str) -> dict[str, Any]:
    whole = _size(name)
    for more in ({"depth": 2}, {"depths": (2,) * 4}, {"depths": (2,) * 3}, {"layers": (1,) * 4}):
        with suppress(Exception):  # it has no such argument, or another number of stages
            if whole > 2_000_000 and _size(name, **more) < whole:
                return more
    return {}


def _image_size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


def _on_small_images(name: str, more: dict[str, Any]) -> tuple[dict[str, Any], int] | None:
    usual = _image_size(name)
    for size in sorted({size for size in (64, 96, 128, 160, 192, 224) if size < usual} | {usual}):
        for sized in ({**more, "img_size": size}, more):
            with suppress(Exception), torch.device("meta"), torch.no_grad():  # try another size
                timm.create_model(name, num_classes=16, **sized).eval()(torch.zeros(1, 3, size, size))
                return sized, size
    return None


# ---- batches


def _ids(samples: int, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed + samples)
    return torch.randint(FIRST_WORD, tiny.VOCABULARY, (samples, tokens), generator=random)


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0]))


def _text(model: nn.Module, n: int) -> dict[str, Any]:
    return {"input_ids": _ids(n)}


def _codebooks(model: nn.Module, n: int) -> dict[str, Any]:
    return {"input_ids": _ids(n * model.config.num_codebooks)}


def _from_a_target(model: nn.Module, n: int) -> dict[str, Any]:
    """Inputs of a draft model, which the target model would compute."""
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = {a.layer_type: (tiny.HEADS // a.num_key_value_groups, TOKENS, a.head_dim) for a in attentions}
    return {
        "inputs_embeds": _normal(n, 1, 2 * model.config.backbone_hidden_size),
        "position_ids": torch.full((n, 1), TOKENS),
        "shared_kv_states": {
            kind: tuple(_normal(n, *shape, seed=seed) for seed in (2, 3)) for kind, shape in heads.items()
        },
    }


_SPECIAL_BATCHES: dict[str, Callable[[nn.Module, int], dict[str, Any]]] = {
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "gemma4_assistant": _from_a_target,
    "gemma4_unified_assistant": _from_a_target,
}


def _text_pairs(model: nn.Module, n: int) -> dict[str, Any]:
    return {"input_ids": _ids(n), "decoder_input_ids": _ids(n, 16, seed=5)}


def _images(model: nn.Module, n: int) -> dict[str, Any]:
    return {"pixel_values": _normal(n, 3, IMAGE, IMAGE)}


def _captions(model: nn.Module, n: int) -> dict[str, Any]:
    return _text(model, n) | _images(model, n)


def _images_in_text(model: nn.Module, n: int) -> dict[str, Any]:
    """The image tokens of one image, as many as the model needs, followed by text."""
    image = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    places = int((IMAGE // PATCH * getattr(model.config, "downsample_ratio", 1)) ** 2)
    return _images(model, n) | {"input_ids": torch.cat([torch.full((n, places), image), _ids(n)], 1)}


def _patches_in_text(model: nn.Module, n: int) -> dict[str, Any]:
    """Qwen-VL: images are rows of patches, with the grids that they form."""
    vision, side = model.config.vision_config, IMAGE // PATCH
    places = (side // vision.spatial_merge_size) ** 2
    ids = torch.cat([torch.full((n, places), model.config.image_token_id), _ids(n)], 1)
    return {
        "input_ids": ids,
        "pixel_values": _normal(n * side**2, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * n),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }


def _spectra(model: nn.Module, n: int) -> dict[str, Any]:
    """Whisper: two frames per position of the encoder."""
    frames = 2 * model.config.max_source_positions
    return {"input_features": _normal(n, model.config.num_mel_bins, frames), "decoder_input_ids": _ids(n, 16)}


def _waves(model: nn.Module, n: int) -> dict[str, Any]:
    return {"input_values": _normal(n, 4000)}


_OTHERS = {
    _text_pairs: """
        T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration
        LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration BartForConditionalGeneration
        MBartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel BlenderbotForConditionalGeneration
        M2M100ForConditionalGeneration LEDForConditionalGeneration ProphetNetForConditionalGeneration
    """,
    _spectra: "WhisperForConditionalGeneration",
    _text: """
        BertForMaskedLM BertForSequenceClassification RobertaForMaskedLM XLMRobertaForMaskedLM AlbertForMaskedLM
        DistilBertForMaskedLM ElectraForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM
        MPNetForMaskedLM LongformerForMaskedLM FunnelForMaskedLM FNetForMaskedLM ConvBertForMaskedLM
        MobileBertForMaskedLM SqueezeBertForMaskedLM NystromformerForMaskedLM
    """,
    _images: """
        ViTForImageClassification DeiTForImageClassification BeitForImageClassification Dinov2ForImageClassification
        Dinov2WithRegistersForImageClassification DINOv3ViTModel SwinForImageClassification Swinv2ForImageClassification
        ConvNextForImageClassification ConvNextV2ForImageClassification ResNetForImageClassification
        RegNetForImageClassification MobileNetV2ForImageClassification MobileViTForImageClassification
        SegformerForImageClassification PvtForImageClassification PoolFormerForImageClassification CLIPVisionModel
        SiglipVisionModel IJepaForImageClassification
    """,
    _captions: "CLIPModel SiglipModel BlipForConditionalGeneration ViltModel",
    _images_in_text: """
        LlavaForConditionalGeneration PaliGemmaForConditionalGeneration InternVLForConditionalGeneration
    """,
    _patches_in_text: """
        Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
        Qwen3VLMoeForConditionalGeneration
    """,
    _waves: "Wav2Vec2ForCTC HubertForCTC WavLMForCTC",
}
"""The classes that take each kind of batches."""
OTHERS = {name: batches for batches, names in _OTHERS.items() for name in names.split()}


# ---- the checks


def run(model: nn.Module, batch: Any) -> Any:
    """Run the plain forward pass that `prune` runs for such a batch."""
    with torch.no_grad():
        return model(**batch) if isinstance(batch, Mapping) else model(batch[0] if isinstance(batch, tuple) else batch)


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter with two or more dimensions: a `weight` under its module, a tied one under each module."""
    return {
        f"{module_name}.{name}".removesuffix(".weight").lstrip("."): parameter
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def _finite(output: Any) -> bool:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert leaves, "the model returns no floating-point output"
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def check(family: Family, slowly: bool = True, ways: Sequence[tuple[str, str]] | None = None) -> Result:
    """Prune a model in every way, or in some, and check the result by assertions."""
    result = Result(family.kind, family.name, family.model)
    try:
        dense = family.build()
        for batch in family.batches(dense):
            finite = _finite(run(dense, batch))
    except Exception as error:
        raise CannotBuild(first_line(error)) from error
    assert finite, "outputs of the dense model are not finite"
    for sequential, pattern in ways or family.ways:
        model = copy.deepcopy(dense)
        choices = {"pattern": pattern, "sequential": sequential, "keep_batch_norm": True, "progress": False}
        report = prune(model, family.batches(model), 0.5, **choices)
        _verify(model, dense, report, pattern)
        assert all(_finite(run(model, batch)) for batch in family.batches(model)), f"not finite: {pattern}"
        if (sequential, pattern) == ("block", "unstructured"):
            result.sparsity = report.sparsity
            result.coverage, result.left_out = _coverage(dense, report, family.batches(dense))
    result.slow = _compare(dense, family.batches(dense)) if slowly else ""
    result.status = "passes"
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
    """Return which fraction of the matrices inside the reached blocks is pruned, and why the rest is not."""
    blocks, idle = _reached_blocks(model, batches)
    found = _matrices(model)
    matrices = [("pruned", layer.name, layer.size) for layer in report.layers]
    matrices += [(m.detail, m.name, found[m.name].numel()) for m in report.skipped if m.name in found]
    sizes: Counter[str] = Counter(pruned=0)
    for detail, name, size in matrices:
        if _inside(name, blocks) and not _inside(name, idle) and not detail.startswith(_OUTSIDE):
            sizes[detail] += size
    total = max(1, sum(sizes.values()))
    return sizes.pop("pruned") / total, {reason: n / total for reason, n in sizes.most_common()}


def _inside(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}." if module else "") for module in modules)


def _reached_blocks(model: nn.Module, batches: list[Any]) -> tuple[set[str], set[str]]:
    """Return the outermost repeated modules, and the modules that no batch enters.

    If the repeated modules hold less than half of the parameters, the whole model counts as one block. A single layer
    never counts as a module that no batch enters, since another module may read its weight.
    """
    modules, called = dict(model.named_modules()), set()
    with ExitStack() as hooks:
        for name, module in modules.items():
            entering = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            hooks.callback(entering.remove)
        for batch in batches:
            run(model, batch)
    idle = {name for name, module in modules.items() if next(module.children(), None) is not None}
    idle -= {name for name in idle if any(_inside(other, {name}) for other in called)}
    lists = {name for name, module in modules.items() if isinstance(module, nn.ModuleList | nn.Sequential)}
    repeated = {f"{name}.{child}".lstrip(".") for name in lists for child, _ in modules[name].named_children()}
    repeated |= {name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)}
    sizes = {name: p.numel() for name, p in _matrices(model).items() if "embed" not in name and not _inside(name, idle)}
    inside = sum(n for name, n in sizes.items() if _inside(name, repeated))
    return repeated if inside >= sum(sizes.values()) / 2 else {""}, idle


# ---- the slow procedure


def _compare(dense: nn.Module, batches: list[Any]) -> str:
    """Return the dtype in which the masks for sequential="block" equal those of the slow procedure."""
    model, wide = copy.deepcopy(dense), tree_map_only(Tensor, _double, batches)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products are not intercepted, and have no float64
    narrow = copy.deepcopy(model)
    try:
        model.double()
        for batch in wide:
            run(model, batch)
    except RuntimeError:  # some part of it always computes in float32
        model, wide = narrow, batches
    batches, dtype = wide, next(model.parameters()).dtype
    slow = copy.deepcopy(model)
    prune(model, batches, 0.5, sequential="block", progress=False)
    slow_prune(slow, batches)
    expected = dict(slow.named_parameters())
    other = {name: int(((p == 0) != (expected[name] == 0)).sum()) for name, p in model.named_parameters()}
    if worst := [name for name, count in other.items() if count]:
        counts = f"{sum(other.values())} of {sum(int((p == 0).sum()) for p in model.parameters())}"
        raise AssertionError(f"{dtype}: {counts} zeros are not those of the slow procedure, in {worst[0]} first")
    return str(dtype).removeprefix("torch.")


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def slow_prune(model: nn.Module, batches: list[Any], sequential: str = "block", sparsity: float = 0.5) -> None:
    """Prune with Wanda, unit by unit, in plain code.

    For each unit, every batch runs through the model as pruned so far, up to the first end of that unit. The inputs of
    a weight are read where PyTorch multiplies, below all modules. Padding is found in the products with as many tokens
    as the `attention_mask` has, so not in those of experts.
    """
    units = find_layers(model, sequential).units
    for unit in units if sequential == "none" else _in_order(model, units, batches):
        sums = _InputSquares(unit.layers)
        handle = (unit.module or model).register_forward_hook(_stop)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            sums.tokens = None if mask is None else mask.flatten().bool()
            with suppress(_UnitDone), _Products(sums.on_product):
                run(model, batch)
        handle.remove()
        for layer in unit.layers:
            sums.zero_smallest(layer, sparsity)


class _UnitDone(Exception):
    """The unit has run, so the rest of the model need not."""


def _stop(*_: object) -> None:
    raise _UnitDone


class _Products(TorchDispatchMode):
    """Call a function for each product, with the weight, and with the tokens that it multiplies.

    For a convolution, it gets the sum of x² that each weight multiplies, in the shape of the weight: the gradient of
    the summed output with respect to that weight, for the input x².
    """

    def __init__(self, on_product: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._on_product = on_product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            x, weight = args[-2:]
            if weight.ndim == 3 and weight.stride(0) == 0:  # one matrix for all samples
                x, weight = x.flatten(0, 1), weight[0]
            self._on_product(weight, x)
        elif func.overloadpacket is aten.convolution:
            x, weight, _, *options = args
            ones, only_weight = torch.ones_like(output), (False, True, False)
            _, squares, _ = aten.convolution_backward(ones, x.square(), weight, None, *options, only_weight)
            self._on_product(weight, squares)
        return output


class _InputSquares:
    """Sum x² over the tokens that are multiplied with each weight, in whichever layout it is stored.

    For an expert that few tokens reach, the tokens of all experts count, as in `prune`.
    """

    def __init__(self, layers: Sequence[Layer], enough: int = 32) -> None:
        self.tokens: Tensor | None = None  # which tokens of the batch are no padding
        self._enough, self._all = enough, layers
        self._layers = {layer.parameter.data_ptr(): layer for layer in layers}  # any of the experts of a parameter
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: Counter[tuple[int, int]] = Counter()
        self._columns: dict[int, bool] = {}

    def on_product(self, weight: Tensor, x: Tensor) -> None:
        start = weight.untyped_storage().data_ptr()
        if start not in self._layers:
            return
        if _is_convolution(layer := self._layers[start]):
            self._sums[start, 0] = self._sums.get((start, 0), 0) + x
            return
        one = layer.part(layer.parameter)
        self._columns[start] = (weight.shape[-2], weight.stride(-2)) == (one.shape[0], one.stride(0))
        first = weight.storage_offset() // one.numel()
        for place, tokens in enumerate(x if weight.ndim == 3 else [x]):
            kept = tokens.any(1)  # a row of zeros is the token of another expert
            rows = tokens[kept & self.tokens if self.tokens is not None and len(self.tokens) == len(kept) else kept]
            key = (start, first + place)
            self._sums[key] = self._sums.get(key, 0) + rows.square().sum(0)
            self._counts[key] += len(rows)

    @torch.no_grad()
    def zero_smallest(self, layer: Layer, sparsity: float) -> None:
        own = _key(layer)
        siblings = {_key(other) for other in self._all if layer.siblings and other.siblings == layer.siblings}
        keys = siblings if siblings and self._counts[own] < self._enough else {own}
        if not keys & self._sums.keys():
            return
        total = sum(value for key, value in self._sums.items() if key in keys)
        rows = layer.part(layer.parameter)
        if _is_convolution(layer):  # kernel positions, then channels: of equal scores (only padding) the first goes
            group, groups = layer.group or (0, 1)
            rows, total = rows.movedim(1, -1), total.chunk(groups)[group].movedim(1, -1)
        elif any(self._columns.get(start) for start, _ in keys):  # perhaps only siblings got tokens
            rows = rows.t()
        if not total.any():  # nothing to compare: the layer stays dense
            return
        for row, scores in zip(rows, rows.abs() * total.sqrt(), strict=True):
            smallest = scores.flatten().argsort(stable=True)[: int(scores.numel() * sparsity)]
            row[torch.unravel_index(smallest, row.shape)] = 0


def _key(layer: Layer) -> tuple[int, int]:
    return layer.parameter.data_ptr(), layer.expert or 0


def _is_convolution(layer: Layer) -> bool:
    return layer.expert is None and layer.parameter.ndim > 2


def _in_order(model: nn.Module, units: Sequence[Unit], batches: list[Any]) -> list[Unit]:
    """Sort units: the next one is the first in model order that is the next for any batch."""
    unit_of = {layer.parameter.data_ptr(): index for index, unit in enumerate(units) for layer in unit.layers}
    routes = []
    for batch in batches:
        starts: list[int] = []
        with _Products(lambda weight, _, starts=starts: starts.append(weight.untyped_storage().data_ptr())):
            run(model, batch)
        routes.append(list(dict.fromkeys(unit_of[start] for start in starts if start in unit_of)))
    order: list[int] = []
    while any(routes):
        order.append(min(route[0] for route in routes if route))
        routes = [[index for index in route if index != order[-1]] for route in routes]
    return [units[index] for index in order]


# ---- the page


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{Path(where.filename).name}:{where.lineno}"
    return f"{type(error).__name__}: {text[0][:300] if text else 'without a message'} ({line})"


def examine(family: Family) -> Result:
    """Call `check`, and return errors as results."""
    started = time.process_time()
    try:
        result = check(family)
    except CannotBuild as error:
        result = Result(family.kind, family.name, family.model, str(error), "cannot be built here")
    except Exception as error:
        result = Result(family.kind, family.name, family.model, first_line(error), "fails")
    result.seconds = time.process_time() - started
    return result


def table(*rows: Sequence[object]) -> list[str]:
    """Return the lines of a table of Markdown; the first row is its head."""
    texts = [[str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    texts.insert(1, ["---"] * len(texts[0]))
    return [f"| {' | '.join(row)} |" for row in texts]


def document(results: Sequence[Result]) -> str:
    """Return the text of docs/models.md."""
    used = {name: version.partition("+")[0] for name, version in versions().items()}
    kinds = {kind: [result for result in results if result.kind == kind] for kind in KINDS}
    kinds = {kind: own for kind, own in kinds.items() if own}
    head = ("", "models", "pass", "fail", "cannot be built here", "median coverage", "coverage below 80 %")
    lines = [
        "# Which models can be pruned",
        "",
        "For every row of the lists, a script builds one small random model, prunes it to 50 % and to 2:4 with "
        '`sequential="block"` and `"layer"` (timm models also with `"none"`), and checks the result. Each matrix '
        "inside the blocks has exactly its sparsity or is skipped with a reason, skipped weights have not changed, "
        'outputs are finite, and the masks for `"block"` equal those of a slow, independent procedure. '
        f"`PYTHONPATH=tests python tests/support/families.py --write` wrote this page with torch {used['torch']}, "
        f"transformers {used['transformers']} and timm {used['timm']}.",
        "",
        "Coverage is the number of pruned parameters divided by that of all matrices inside the blocks that a batch "
        "reaches, without embeddings, output heads and stems. Slow is the dtype in which the masks equal those of the "
        "slow procedure. Seconds are the total on one CPU thread. The sizes are tiny, so small matrices count for more "
        "than in real models.",
        "",
        *table(head, *((KINDS[kind], *_summary(own)) for kind, own in kinds.items())),
        "",
        share(results),
    ]
    for kind, own in kinds.items():
        own.sort(key=lambda result: result.name)
        lines += ["", f"## {KINDS[kind]}", ""]
        if bad := [result for result in own if result.status != "passes"]:
            lines += [
                *table(("family", "class", "", "cause"), *((r.name, r.model, r.status, r.cause) for r in bad)),
                "",
            ]
        columns = ("family", "class", "sparsity", "coverage", "left dense", "slow", "seconds")
        lines += table(columns, *(_row(result) for result in own if result.status == "passes"))
    return "\n".join(lines) + "\n"


def share(results: Sequence[Result]) -> str:
    """Return the summary sentence."""
    counts = Counter(result.status for result in results)
    passed, built = counts["passes"], len(results) - counts["cannot be built here"]
    return f"{passed} of {built} models that can be built pass: {passed / max(1, built):.1%}."


def _summary(results: Sequence[Result]) -> list[object]:
    counts = Counter(result.status for result in results)
    coverages = sorted(result.coverage for result in results if result.status == "passes")
    median = f"{coverages[len(coverages) // 2]:.0%}" if coverages else ""
    each = [counts[status] for status in ("passes", "fails", "cannot be built here")]
    return [len(results), *each, median, sum(coverage < 0.8 for coverage in coverages)]


def _row(result: Result) -> list[str]:
    left = "; ".join(f"{part:.0%} {reason}" for reason, part in [*result.left_out.items()][:2] if part > 0.005)
    shown = [f"{result.sparsity:.1%}", f"{result.coverage:.0%}", left, result.slow, f"{result.seconds:.1f}"]
    return [result.name, result.model, *shown]


def page(text: str, old: str) -> str:
    """Return docs/models.md with another text of its first part, or of its second part, on hidden units."""
    start = old.find("## Hidden units")
    first, second = (old[:start], old[start:]) if start >= 0 else (old, "")
    return f"{first.rstrip()}\n\n{text}" if text.startswith("## ") else f"{text}\n{second}".rstrip() + "\n"


def main(examine: Any = examine, result_class: Any = Result, document: Any = document, share: Any = share) -> None:
    """Examine the chosen families, in a process that continues after a crash, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="which families, by name")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--resume", type=Path, help="JSON file of results: families in it are not examined again")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    logging.getLogger("wanda_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.resume.read_text()) if args.resume and args.resume.exists() else {}
    every = [(kind, name) for kind in args.kind for name in names(kind)]
    chosen = {f"{kind}/{name}": (kind, name) for kind, name in every if any(fnmatchcase(name, g) for g in args.only)}
    for key, (kind, name) in chosen.items():
        if key not in results:
            chosen_family = family(kind, name)
            # If the process crashes, this stays, and the next run continues with the next family.
            results[key] = asdict(result_class(kind, name, chosen_family.model, "the process crashed"))
            if args.resume:
                args.resume.write_text(json.dumps(results, indent=1))
            result = examine(chosen_family)
            results[key] = asdict(result)
            print(f"{key:52}{result.seconds:7.1f} s  {result}", flush=True)
    if args.resume:
        args.resume.write_text(json.dumps(results, indent=1))
    done = [result_class(**results[key]) for key in chosen]
    if args.write:
        path = Path(__file__).parents[2] / "docs" / "models.md"
        path.write_text(page(document(done), path.read_text(encoding="utf-8")), encoding="utf-8")
    print(share(done))


if __name__ == "__main__":
    main()
