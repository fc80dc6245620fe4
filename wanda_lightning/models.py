"""What there is to prune in a model, and why the rest is left alone.

The only file that knows layer types and model families.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from wanda_lightning.core.names import matches, refuse_unmatched
from wanda_lightning.distributed import local

Granularity = Literal["block", "layer", "model"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)

_STEM = re.compile(r"(^|\.)((conv_)?stem|patch_embed(ding)?s?|patch_embedder)(\.|$)")
_STANDARDISED = re.compile("Std(Conv|Linear)|WeightStandardi[sz]ed")
_QUANTISERS = {
    *("aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel", "hqq", "optimum"),
    *("quanto", "torchao", "vptq"),
}
_REMOVERS = {  # old hooks of torch that make a weight anew at each forward, by class
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
    "BasePruningMethod": "torch.nn.utils.prune.remove(layer, 'weight')",
}
_USUAL = ("embedding", "output head", "stem", "adapter", "tied to ")  # starts of reasons that surprise nobody
_NO_LABEL = -100  # what transformers pads labels with
_IMAGE_CHANNELS = 4  # a model's first convolution, over so few channels, reads the raw image


@dataclass(frozen=True)
class LayerKind:
    """How one type of layer is seen as a matrix product `tokens @ weight.T`.

    Attributes:
        layer_type: The class; subclasses count if they keep its forward.
        read: A weight in the layer's own layout as (d_out, d_in), a view where the layout allows.
        write: Puts such a matrix back into the weight.
        tokens: What the layer was called with, as (tokens, d_in).
        outputs: What it gave, as (tokens, d_out).
        window: What else than the tensor itself decides its tokens; layers with one input and one window share
            statistics.
        rows_first: Whether the weight's first dimension is d_out, so that some of its rows can be read alone.
    """

    layer_type: type[nn.Module]
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], object]
    tokens: Callable[[Any, Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    window: Callable[[Any], object]
    rows_first: bool = True


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    return _rows(x)


# Kernel positions outside, input channels inside: where M divides the channels, an N:M group is consecutive channels of
# one kernel position, the reduction order of sparse implicit-GEMM convolutions.
def _read_conv2d(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1)


def _write_conv2d(weight: Tensor, matrix: Tensor) -> None:
    _, channels, height, width = weight.shape
    weight.copy_(matrix.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2))


def _conv2d_tokens(layer: nn.Conv2d, images: Tensor) -> Tensor:
    if images.ndim == 3:
        images = images.unsqueeze(0)
    if layer.padding_mode != "zeros":
        images = F.pad(images, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif any(layer._reversed_padding_repeated_twice):
        images = F.pad(images, layer._reversed_padding_repeated_twice)
    if layer.kernel_size == (1, 1):
        vertical, horizontal = layer.stride
        return images[:, :, ::vertical, ::horizontal].permute(0, 2, 3, 1).flatten(0, 2)
    columns = F.unfold(images, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    columns = columns.unflatten(1, (images.shape[1], -1))  # (batch, channels, kernel positions, places)
    return columns.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def _conv2d_same_tokens(layer: nn.Conv2d, images: Tensor) -> Tensor:
    from timm.layers.padding import pad_same

    padded = pad_same(images, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    return _conv2d_tokens(layer, padded)  # its own padding is 0


def _pixels(images: Tensor) -> Tensor:
    return images.movedim(-3, -1).flatten(0, -2)


def _conv2d_window(layer: nn.Conv2d) -> object:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode


@cache
def layer_kinds() -> dict[str, LayerKind]:
    """The layer types that can be pruned, by name."""
    from timm.layers.conv2d_same import Conv2dSame
    from transformers.pytorch_utils import Conv1D

    convolution = LayerKind(nn.Conv2d, _read_conv2d, _write_conv2d, _conv2d_tokens, _pixels, _conv2d_window)
    return {
        "Linear": LayerKind(nn.Linear, lambda weight: weight, Tensor.copy_, _linear_tokens, _rows, lambda layer: ()),
        "Conv1D": LayerKind(  # GPT-2's linear layer, its weight stored as (d_in, d_out)
            Conv1D,
            Tensor.t,
            lambda weight, matrix: weight.copy_(matrix.t()),
            _linear_tokens,
            _rows,
            lambda layer: (),
            rows_first=False,
        ),
        "Conv2d": convolution,
        "Conv2dSame": replace(convolution, layer_type=Conv2dSame, tokens=_conv2d_same_tokens),  # pads by input size
    }


# An expert's matrix in a parameter (experts, d_out, d_in), or (experts, d_in, d_out).
_EXPERT_BY_ROWS = LayerKind(nn.Module, lambda weight: weight, Tensor.copy_, _linear_tokens, _rows, lambda layer: ())
_EXPERT_BY_COLUMNS = replace(
    _EXPERT_BY_ROWS, read=Tensor.t, write=lambda weight, matrix: weight.copy_(matrix.t()), rows_first=False
)


def _of_group(kind: LayerKind, group: int, groups: int) -> LayerKind:
    """What a group of a convolution sees and gives: its channels."""

    def part(images: Tensor) -> Tensor:
        return images.chunk(groups, -3)[group]

    return replace(
        kind,
        tokens=lambda layer, images: kind.tokens(layer, part(images)),
        outputs=lambda images: kind.outputs(part(images)),
        window=lambda layer: (kind.window(layer), group, groups),
    )


@dataclass(frozen=True)
class Layer:
    """One prunable matrix and the module that it lives in.

    Attributes:
        name: Its module, or an expert's number in the parameter (`experts.down_proj.3`), or a group (`conv.group3`).
        module: Where it lives.
        kind: How it is seen as a matrix.
        parameter_name: What the module calls the parameter that holds it.
        expert: Its number in a parameter of three dimensions, which holds a matrix for each expert; else None.
        group: Which group of a grouped convolution it is, and of how many; else None.
        siblings: The experts' matrices of which this is one, as a glob; `""` where it is no expert's.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    parameter_name: str = "weight"
    expert: int | None = None
    group: tuple[int, int] | None = None
    siblings: str = ""

    def read(self) -> Tensor:
        """The weight as (d_out, d_in); of a sharded one, the rows of this process."""
        return self.kind.read(self.weight)

    def write(self, matrix: Tensor) -> None:
        """Put such a matrix back, in place."""
        self.kind.write(self.weight, matrix)

    def tokens(self, x: Tensor) -> Tensor:
        """What the layer was called with, as (tokens, d_in)."""
        return self.kind.tokens(self.module, x)

    def outputs(self, y: Tensor) -> Tensor:
        """What the layer gave, as (tokens, d_out)."""
        return self.kind.outputs(y)

    @property
    def window(self) -> object:
        """Layers with the same input tensor and an equal window have the same tokens."""
        return self.kind.layer_type, self.kind.window(self.module)

    @property
    def parameter(self) -> Tensor:
        """The parameter itself, in its own shape; it may hold other experts or groups, too."""
        weight = getattr(self.module, self.parameter_name)
        assert isinstance(weight, Tensor)
        return weight

    def part(self, tensor: Tensor) -> Tensor:
        """What belongs to this layer of a tensor that has the shape of its parameter."""
        if self.group is not None:
            which, groups = self.group
            return tensor.chunk(groups)[which]
        return tensor if self.expert is None else tensor[self.expert]

    @property
    def weight(self) -> Tensor:
        """The values without gradients; of a sharded parameter, those of this process."""
        return self.part(local(self.parameter.detach()))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight in its own layout, over all processes."""
        return tuple(self.part(torch.empty(self.parameter.shape, device="meta")).shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the whole matrix, over all processes."""
        d_out, d_in = self.kind.read(torch.empty(self.stored_shape, device="meta")).shape
        return d_out, d_in

    @property
    def size(self) -> int:
        """Number of weights, over all processes."""
        return math.prod(self.stored_shape)


@dataclass(frozen=True)
class Unit:
    """Where calibration batches stop: a block, a layer, or (module None) the model as a whole."""

    name: str
    module: nn.Module | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Skipped:
    """A matrix that is left as it is."""

    name: str
    shape: tuple[int, ...]
    reason: str
    unprunable: bool = False  # integer or packed weights: the user must decide, see `PruningConfig`
    by_user: bool = False  # left out by `skip` or `only`

    @property
    def is_a_surprise(self) -> bool:
        """Whether a user might have thought it pruned."""
        return not self.by_user and not self.reason.startswith(_USUAL)


@dataclass(frozen=True)
class Walk:
    """Every matrix of a model: to be pruned, in units, or skipped with a reason."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to be pruned, in walk order."""
        return tuple(layer for unit in self.units for layer in unit.layers)


def walk(
    model: nn.Module,
    granularity: str = "block",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    include_grouped: bool = False,
) -> Walk:
    """Find the layers to prune, group them in units, and give every other matrix its reason.

    Works on any device, the meta device included.

    Args:
        model: Any module.
        granularity: `"block"`, `"layer"` or `"model"`: what the units are.
        skip: Layers to leave dense: module names or globs (with everything inside), or `re:` and a regular expression
            that matches a whole name.
        only: The layers to prune, likewise, where not all; what `skip` names stays dense.
        include_grouped: Prune grouped convolutions, each group as a matrix of its own.

    Raises:
        ValueError: If the granularity is unknown or a pattern in `skip` or `only` matches no matrix.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is one of {', '.join(GRANULARITIES)}, but {granularity!r} was given")
    modules = dict(model.named_modules())
    reasons = _reasons_to_skip(model, modules, include_grouped)
    by_columns = _stored_by_columns(modules)
    layers: list[Layer] = []
    owner: dict[int, str] = {}
    embeddings: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.setdefault(id(module.weight), name)
    skipped = [
        _packed(name, buffer, modules[name.rpartition(".")[0]])
        for name, buffer in model.named_buffers()
        if _is_packed_weight(name, buffer)
    ]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            skipped.append(Skipped(name, (), "has no shape yet: run one batch through the model first", True))
            continue
        if parameter.ndim < 2:
            continue
        module_name, _, parameter_name = name.rpartition(".")
        if module_name not in modules:  # the same module under a second name
            continue
        module = modules[module_name]
        label = module_name if parameter_name == "weight" and module_name else name
        left = parameter_name == "weight" and module_name in reasons
        found = [] if left else _as_layers(label, module, parameter_name, modules, by_columns)
        first = embeddings.get(id(parameter)) or owner.setdefault(id(parameter), label)
        if first != label:
            skipped.append(Skipped(label, tuple(parameter.shape), f"tied to {first}"))
            aliases.setdefault(first, []).append(label)
            for part in found:  # an expert, or a group
                if suffix := part.name.removeprefix(label):
                    aliases.setdefault(first + suffix, []).append(part.name)
        elif _is_packed(parameter) or _quantiser(module, parameter):
            skipped.append(_packed(label, parameter, module))
        elif left or (found and module_name in reasons):
            skipped.append(Skipped(label, tuple(parameter.shape), reasons[module_name]))
        elif not found:
            skipped.append(Skipped(label, tuple(parameter.shape), _why_no_layer(module, parameter_name)))
        else:
            layers.extend(found)
    for layer in tuple(layers):
        if other := next((name for name in aliases.get(layer.name, ()) if name in reasons), None):
            layers.remove(layer)
            skipped.append(Skipped(layer.name, layer.stored_shape, f"tied to {other}: {reasons[other]}"))
    layers, left_out = _leave_out(layers, skipped, skip, only, aliases)
    return Walk(_units(model, modules, layers, granularity), left_out)


_ENOUGH = 0.8  # of the weights that a user would think pruned


def low_coverage(found: Walk, dense: Mapping[str, str] = {}) -> str | None:
    """Says it where much is not pruned that is no embedding, stem or head and that nobody asked to leave out.

    Args:
        found: What was found.
        dense: Layers that were left dense all the same, with the reasons.
    """
    left = [(s.reason, s.name, math.prod(s.shape)) for s in found.skipped if s.is_a_surprise]
    left += [(dense[layer.name], layer.name, layer.size) for layer in found.layers if layer.name in dense]
    pruned = sum(layer.size for layer in found.layers if layer.name not in dense)
    total = pruned + sum(size for _, _, size in left)
    if pruned >= _ENOUGH * total:
        return None
    alike: dict[str, list[tuple[str, int]]] = {}
    for reason, name, size in left:
        alike.setdefault(reason, []).append((name, size))
    largest = sorted(alike.items(), key=lambda item: -sum(size for _, size in item[1]))[:3]
    texts = []
    for reason, matrices in largest:
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        texts.append(f"{matrices[0][0]}{more}, {sum(size for _, size in matrices):,} weights: {reason}")
    share = f"{pruned / total:.0%} of the weights besides embeddings, stem and head"
    return f"only {share} are in pruned layers; left out are most of all {'; '.join(texts)}"


def _as_layers(
    name: str,
    module: nn.Module,
    parameter_name: str,
    modules: Mapping[str, nn.Module],
    by_columns: Mapping[type[nn.Module], bool],
) -> list[Layer]:
    """The layers that a parameter holds: one, or one for each expert or group, or none."""
    if parameter_name == "weight" and any(isinstance(module, kind.layer_type) for kind in layer_kinds().values()):
        kind = _kind_of(module)
        if kind is None:
            return []
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        if groups == 1:
            return [Layer(name, module, kind, siblings=_siblings(name, modules))]
        return [Layer(f"{name}.group{g}", module, _of_group(kind, g, groups), group=(g, groups)) for g in range(groups)]
    if parameter_name not in stacked_experts(module) or type(module) not in by_columns:
        return []
    kind = _EXPERT_BY_COLUMNS if by_columns[type(module)] else _EXPERT_BY_ROWS
    number = len(getattr(module, parameter_name))
    return [Layer(f"{name}.{e}", module, kind, parameter_name, e, siblings=f"{name}.*") for e in range(number)]


def _kind_of(module: nn.Module) -> LayerKind | None:
    """How a module is seen as a matrix, if it is a product with its weight."""
    if parametrize.is_parametrized(module, "weight"):
        return None
    kinds = [kind for kind in layer_kinds().values() if isinstance(module, kind.layer_type)]
    kept = [kind for kind in kinds if type(module).forward is kind.layer_type.forward]
    if not kept and isinstance(module, nn.Linear) and _acts_as_linear(module):
        kept = kinds
    return kept[0] if kept else None


@torch.no_grad()
def _acts_as_linear(module: nn.Linear) -> bool:
    """Whether a forward of its own gives `x W^T + b` all the same, tried on a small stand-in of the module.

    Like timm's Linear, which once cast for autocast, or Falcon's. What quantises, scales or routes does not.
    """
    weight = torch.tensor([[0.7, -1.3, 0.1], [-0.4, 0.9, 2.3]], device="cpu")
    bias = None if module.bias is None else torch.tensor([0.6, -1.1], device="cpu")
    x = torch.tensor([[[1.7, -0.3, 50.1], [0.2, 0.9, -1.4]], [[-0.6, 2.2, 0.0], [31.3, -7.7, 0.8]]], device="cpu")
    stand_in = object.__new__(type(module))
    stand_in.__dict__ = {**module.__dict__, "in_features": 3, "out_features": 2}
    stand_in.__dict__["_parameters"] = {**module._parameters, "weight": weight, "bias": bias}
    try:
        with torch.autocast("cpu", enabled=False):
            given, expected = type(module).forward(stand_in, x), F.linear(x, weight, bias)
            return given.shape == expected.shape and torch.allclose(given, expected, rtol=1e-5)
    except Exception:  # whatever it needs, it is not the weight and the bias alone
        return False


def _siblings(name: str, modules: Mapping[str, nn.Module]) -> str:
    """A glob for what this layer is in each module of a list of experts; `""` where it is in none."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        container = modules.get(".".join(parts[:end]))
        if parts[end - 1].endswith("experts") and isinstance(container, nn.ModuleList | nn.ModuleDict):
            return ".".join([*parts[:end], "*", *parts[end + 1 :]])
    return ""


def stacked_experts(module: nn.Module) -> set[str]:
    """The parameters of a module of which each holds one matrix for each expert, one behind the other.

    Recognised by the number of experts, which the module declares, or its `config` where its class says that it is
    of experts.
    """
    declaring: list[object] = [module]
    if "expert" in type(module).__name__.lower():
        declaring.append(getattr(module, "config", None))
    numbers = {
        value
        for declares in declaring
        for key, value in getattr(declares, "__dict__", {}).items()
        if "expert" in key and "per_tok" not in key and type(value) is int
    }
    return {
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not isinstance(parameter, UninitializedParameter)
        and parameter.ndim == 3
        and len(parameter) in numbers
    }


_ENTRY = re.compile(r"(^|_)(gate|up|in|input|w1|w3|fc1|wi)(_|$)")  # names of what reads the hidden states,
_EXIT = re.compile(r"(^|_)(down|out|output|w2|fc2|wo)(_|$)")  # and of what gives them
_HIDDEN = ("hidden_size", "hidden_dim", "d_model")


def _stored_by_columns(modules: Mapping[str, nn.Module]) -> dict[type[nn.Module], bool]:
    """Of each class of experts, whether it stores their matrices as (d_in, d_out); missing where nothing says so.

    All modules of a class are asked, because square matrices do not tell.
    """
    found: dict[type[nn.Module], set[bool]] = {}
    for module_name, module in modules.items():
        for name in stacked_experts(module):
            _, first, second = getattr(module, name).shape
            votes = found.setdefault(type(module), set())
            declared = getattr(module, "is_transposed", None)
            sizes = [getattr(module, size, None) for size in ("input_size", "output_size")]
            enters, leaves = bool(_ENTRY.search(name)), bool(_EXIT.search(name))
            hidden = _hidden_size(module, module_name, modules)
            if isinstance(declared, bool):  # transformers' own word
                votes.add(declared)
            elif first != second and sorted(sizes, key=str) == sorted([first, second], key=str):
                votes.add(sizes == [first, second])
            elif enters != leaves and (first == hidden) != (second == hidden):
                votes.add((first == hidden) == enters)
    return {kind: votes.pop() for kind, votes in found.items() if len(votes) == 1}


def _hidden_size(module: nn.Module, module_name: str, modules: Mapping[str, nn.Module]) -> int | None:
    """The width of the hidden states, as the module declares it, or the configuration of what it is in."""
    parts = module_name.split(".")
    outer = [modules.get(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    for declares in (module, *(getattr(m, "config", None) for m in (module, *outer))):
        for key in _HIDDEN:
            if type(size := getattr(declares, key, None)) is int:
                return size
    return None


def _routers(modules: Mapping[str, nn.Module]) -> set[nn.Module]:
    """What decides which experts a token goes to: it stands next to them."""
    found: set[nn.Module] = set()
    for module in modules.values():
        children = dict(module.named_children())
        experts = {
            name: child
            for name, child in children.items()
            if name.endswith(("expert", "experts")) or stacked_experts(child)
        }
        numbers = {1}  # a gate of the experts that all tokens go to
        for child in experts.values():
            numbers |= {len(getattr(child, name)) for name in stacked_experts(child)}
            numbers |= {len(child)} if isinstance(child, nn.ModuleList | nn.ModuleDict) else set()
        for name, child in children.items() if experts else ():
            weight = getattr(child, "weight", None)
            one_for_each = isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) in numbers
            if name not in experts and (name in ("router", "gate", "gating") or one_for_each):
                found.update(child.modules())
    return found


def is_wrapper(parameter: Tensor) -> bool:
    """Whether it holds no numbers itself, as quantised tensors that give themselves out as floating-point ones."""
    return not issubclass(type(parameter), nn.Parameter | DTensor)  # isinstance would ask the tensor


def _is_packed(parameter: Tensor) -> bool:
    return is_wrapper(parameter) or not parameter.is_floating_point() or parameter.element_size() < 2


def _quantiser(module: nn.Module, parameter: Tensor) -> str | None:
    """The library that made a layer, or the type of its weight, where that is one that quantises."""
    packages = [kind.__module__.partition(".")[0] for kind in (type(parameter), type(module))]
    return next((package for package in packages if package in _QUANTISERS), None)


def _is_packed_weight(name: str, buffer: Tensor) -> bool:
    return buffer.ndim >= 2 and not buffer.is_floating_point() and "weight" in name.rpartition(".")[2]


def _packed(name: str, weight: Tensor, module: nn.Module) -> Skipped:
    dtype, kind = str(weight.dtype).removeprefix("torch."), type(weight).__name__
    if quantiser := _quantiser(module, weight):
        reason = f"quantised by {quantiser} ({type(module).__name__}, {kind}): prune first, then quantise"
    elif weight.is_floating_point() and weight.element_size() >= 2:
        reason = f"weights of type {kind} cannot be pruned in place"
    else:
        reason = f"{dtype} weights cannot be pruned in place"
    return Skipped(name, tuple(weight.shape), reason, True)


def _why_no_layer(module: nn.Module, parameter_name: str) -> str:
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


def _reasons_to_skip(model: nn.Module, modules: dict[str, nn.Module], include_grouped: bool) -> dict[str, str]:
    """Default reasons by module name, for layers of a prunable kind."""
    reasons: dict[str, str] = {}
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    heads = set().union(*(_heads(module) for module in modules.values()))
    stems = [(name, pattern) for name, module in modules.items() for pattern in _timm_stems(module)]
    routers = _routers(modules)
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
        elif module in routers:
            reasons[name] = "router"
        elif isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            reasons[name] = "depthwise convolution"
        elif isinstance(module, nn.Conv2d) and module.groups > 1 and not include_grouped and _kind_of(module):
            reasons[name] = "grouped convolution: include_grouped=True prunes each group"
        elif isinstance(module, nn.Conv2d) and name == convolutions[0] and module.in_channels <= _IMAGE_CHANNELS:
            reasons[name] = "stem: reads the raw image"
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


def _leave_out(
    layers: list[Layer],
    skipped: list[Skipped],
    skip: Sequence[str],
    only: Sequence[str],
    aliases: Mapping[str, list[str]],
) -> tuple[list[Layer], tuple[Skipped, ...]]:
    every = [layer.name for layer in layers] + [other.name for other in skipped]
    refuse_unmatched(skip, every, "skip", "matrix")
    refuse_unmatched(only, every, "only", "matrix")

    def by_user(name: str) -> str | None:
        names = (name, *aliases.get(name, ()))
        for pattern in skip:
            if any(matches(name, pattern, "skip") for name in names):
                return f"skip={pattern!r}"
        if only and not any(matches(name, pattern, "only") for name in names for pattern in only):
            return f"not in only={list(only)}"
        return None

    chosen = [(layer, by_user(layer.name)) for layer in layers]
    kept = [layer for layer, reason in chosen if reason is None]
    left = [Skipped(layer.name, layer.stored_shape, reason, by_user=True) for layer, reason in chosen if reason]
    # What the user named is decided: packed weights among it are no longer in the way.
    decided = [replace(s, unprunable=False, by_user=True) if by_user(s.name) else s for s in skipped]
    return kept, (*decided, *left)


def _units(model: nn.Module, modules: dict[str, nn.Module], layers: list[Layer], granularity: str) -> tuple[Unit, ...]:
    if granularity == "model":
        return (Unit("", None, tuple(layers)),) if layers else ()
    blocks = _blocks(modules, layers) if granularity == "block" else {}
    names = {module: name or "weight" for name, module in modules.items()}
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        inside = [name for name in blocks if layer.name.startswith(f"{name}.")]
        # Experts and groups that are one parameter are one module, whose forward can be stopped at.
        members.setdefault(inside[0] if inside else names[layer.module], []).append(layer)
    return tuple(Unit(name, modules.get(name, model), tuple(inner)) for name, inner in members.items())


def _blocks(modules: dict[str, nn.Module], layers: list[Layer]) -> dict[str, nn.Module]:
    """The repeated parts of a model, by name; none lies in another.

    transformers says it by class: what can be gradient-checkpointed. Elsewhere a block is a member of a list or
    sequence that holds at least two layers and no smaller such member (a stage of blocks is not a block).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    counts = dict.fromkeys(modules, 0)
    for layer in {id(layer.module): layer for layer in layers}.values():
        parts = layer.name.split(".")
        for length in range(len(parts)):
            prefix = ".".join(parts[:length])
            if prefix in counts:
                counts[prefix] += 1
    declared = [name for name, m in modules.items() if isinstance(m, GradientCheckpointingLayer) and counts[name]]
    listed = [
        f"{name}.{child}" if name else child
        for name, container in modules.items()
        if isinstance(container, nn.ModuleList | nn.Sequential) and not name.endswith("experts")
        for child, member in container.named_children()
        if not isinstance(member, nn.ModuleList | nn.Sequential)
    ]
    listed = [name for name in listed if counts.get(name, 0) >= 2]
    # Inside a model of transformers its own word counts.
    listed = [
        name for name in listed if not any(name.startswith(f"{d}.") or d.startswith(f"{name}.") for d in declared)
    ]
    candidates = declared + [name for name in listed if name not in declared]
    innermost = [name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)]
    return {name: modules[name] for name in innermost}


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch are real.

    Attributes:
        inside: Name of the module whose tokens these are; `""` for the whole model.
        keep: (batch, tokens); True is a token, False is padding.
    """

    inside: str
    keep: Tensor

    def rank(self, layer: str) -> int:
        """Lowest for the mask of the smallest part of the model that holds the layer."""
        holds = not self.inside or f"{layer}.".startswith(f"{self.inside}.")
        return -len(self.inside) if holds else 1

    def fits(self, x: Tensor) -> bool:
        """Whether a layer's input has one row for each token of this mask."""
        return x.shape[:-1] == self.keep.shape or (x.ndim == 2 and len(x) == self.keep.numel())


def fitting_mask(masks: Sequence[TokenMask], name: str, x: Tensor) -> TokenMask | None:
    """Of the masks that line up with a tensor, that of the smallest part of the model around `name`."""
    return next((mask for mask in sorted(masks, key=lambda mask: mask.rank(name)) if mask.fits(x)), None)


def token_masks(model: nn.Module, batch: Any) -> tuple[TokenMask, ...]:
    """The padding of a batch, from its `attention_mask` (an encoder's) and `decoder_attention_mask`.

    Empty where the batch has none, or no padding.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("attention_mask"), Tensor):
        return ()
    masks = [TokenMask("", batch["attention_mask"].bool())]
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
            encoder = next(inner for inner, other in model.named_modules() if other is module.get_encoder())
            masks = [TokenMask(encoder, masks[0].keep)]
            real_tokens: dict[str, Callable[[Tensor], Tensor]] = {
                "decoder_attention_mask": Tensor.bool,
                "decoder_input_ids": lambda ids: torch.ones_like(ids, dtype=torch.bool),
                "labels": lambda labels: labels != _NO_LABEL,
            }
            for key, real in real_tokens.items():
                if isinstance(batch.get(key), Tensor):
                    masks.append(TokenMask(name, real(batch[key])))
                    break
            break
    usable = tuple(mask for mask in masks if mask.keep.ndim == 2)
    return usable if any(not mask.keep.all() for mask in usable) else ()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def meta_model(name: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A model without weights, from its configuration alone, on the meta device.

    Args:
        name: Hub id, folder or .gguf file of a language model; or `timm:NAME` of an image classifier.
        cache_dir: Where downloads from the hub are kept.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        OSError: If there is no such configuration.
        ValueError: If timm knows no such model.
    """
    with torch.device("meta"):
        if name.startswith("timm:"):
            import timm

            try:
                return timm.create_model(name.removeprefix("timm:"), pretrained=False)
            except RuntimeError as error:
                near = difflib.get_close_matches(name.removeprefix("timm:"), timm.list_models(), n=3)
                raise ValueError(f"timm cannot make {name!r}: {error}. Near names: {', '.join(near)}") from error
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        source: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        if name.endswith(".gguf"):
            path = Path(name)
            if not path.is_file():
                raise FileNotFoundError(f"there is no GGUF file {name}")
            name, source["gguf_file"] = str(path.parent), path.name
        try:
            config = AutoConfig.from_pretrained(name, **source)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no configuration of a language model was found for {name!r}: give a hub id, a folder with "
                f"config.json, a .gguf file, or timm:NAME. The cause: {error}"
            ) from error
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


_EXPERTS = "_experts_implementation_internal"


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """The model as calibration needs it: evaluation mode, no key-value cache, every layer called as a module.

    Experts multiply one after the other, by views of their parameter: see `experts.ExpertProducts`.
    """
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    # Not by the property without the last word, whose setter also writes into the configurations inside.
    experts = [(c, vars(c)[_EXPERTS]) for c in configs.values() if _EXPERTS in getattr(c, "__dict__", {})]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False  # a block that runs twice would append its keys twice
        for config, _ in experts:
            setattr(config, _EXPERTS, "eager")
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer reads weights past its layers
        yield
    finally:
        for module in training:
            module.training = True
        for config, use_cache in caching:
            config.use_cache = use_cache
        for config, implementation in experts:
            setattr(config, _EXPERTS, implementation)
        torch.backends.mha.set_fastpath_enabled(fast_path)
