"""How layers are seen as matrices, and which matrices a parameter holds."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wanda_lightning.models.experts import siblings_of, stacked_experts
from wanda_lightning.parallel import local


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
        channels: Which dimension of what enters and what comes out is that of d_in and d_out, counted from the last.
    """

    layer_type: type[nn.Module]
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], object]
    tokens: Callable[[Any, Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    window: Callable[[Any], object]
    rows_first: bool = True
    channels: int = -1


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    return _rows(x)


# Kernel positions outside, input channels inside: where M divides the channels, an N:M group is consecutive channels of
# one kernel position, the reduction order of sparse implicit-GEMM convolutions.
def _read_convolution(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).flatten(1)


def _write_convolution(weight: Tensor, matrix: Tensor) -> None:
    _, channels, *kernel = weight.shape
    weight.copy_(matrix.unflatten(1, (*kernel, channels)).movedim(-1, 1))


def _convolution_tokens(layer: Any, images: Tensor) -> Tensor:
    if images.ndim == 1 + len(layer.kernel_size):
        images = images.unsqueeze(0)
    if layer.padding_mode != "zeros":
        images = F.pad(images, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif any(layer._reversed_padding_repeated_twice):
        images = F.pad(images, layer._reversed_padding_repeated_twice)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if len(kernel) == 1:  # an image of one row
        images, kernel, dilation, stride = images.unsqueeze(-2), (1, *kernel), (1, *dilation), (1, *stride)
    if kernel == (1, 1):
        vertical, horizontal = stride
        return images[:, :, ::vertical, ::horizontal].permute(0, 2, 3, 1).flatten(0, 2)
    columns = F.unfold(images, kernel, dilation=dilation, stride=stride)
    columns = columns.unflatten(1, (images.shape[1], -1))  # (batch, channels, kernel positions, places)
    return columns.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def _conv2d_same_tokens(layer: nn.Conv2d, images: Tensor) -> Tensor:
    from timm.layers.padding import pad_same

    padded = pad_same(images, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    return _convolution_tokens(layer, padded)  # its own padding is 0


def _window(layer: Any) -> object:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode


def _convolution(layer_type: type[nn.Module], dimensions: int) -> LayerKind:
    channels = -1 - dimensions
    return LayerKind(
        layer_type,
        _read_convolution,
        _write_convolution,
        _convolution_tokens,
        lambda images: images.movedim(channels, -1).flatten(0, -2),
        _window,
        channels=channels,
    )


@cache
def layer_kinds() -> dict[str, LayerKind]:
    """The layer types that can be pruned, by name."""
    from timm.layers.conv2d_same import Conv2dSame
    from transformers.pytorch_utils import Conv1D

    conv2d = _convolution(nn.Conv2d, 2)
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
        "Conv1d": _convolution(nn.Conv1d, 1),
        "Conv2d": conv2d,
        "Conv2dSame": replace(conv2d, layer_type=Conv2dSame, tokens=_conv2d_same_tokens),  # pads by input size
    }


# An expert's matrix in a parameter (experts, d_out, d_in), or (experts, d_in, d_out).
EXPERT_BY_ROWS = LayerKind(nn.Module, lambda weight: weight, Tensor.copy_, _linear_tokens, _rows, lambda layer: ())
EXPERT_BY_COLUMNS = replace(
    EXPERT_BY_ROWS, read=Tensor.t, write=lambda weight, matrix: weight.copy_(matrix.t()), rows_first=False
)


def of_group(kind: LayerKind, group: int, groups: int) -> LayerKind:
    """What a group of a convolution sees and gives: its channels."""

    def part(images: Tensor) -> Tensor:
        return images.chunk(groups, kind.channels)[group]

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


def layers_of(
    name: str,
    module: nn.Module,
    parameter_name: str,
    modules: Mapping[str, nn.Module],
    by_columns: Mapping[type[nn.Module], bool],
) -> list[Layer]:
    """The layers that a parameter holds: one, or one for each expert or group, or none."""
    if parameter_name == "weight" and any(isinstance(module, kind.layer_type) for kind in layer_kinds().values()):
        kind = kind_of(module)
        if kind is None:
            return []
        groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
        if groups == 1:
            return [Layer(name, module, kind, siblings=siblings_of(name, modules))]
        return [Layer(f"{name}.group{g}", module, of_group(kind, g, groups), group=(g, groups)) for g in range(groups)]
    if parameter_name not in stacked_experts(module) or type(module) not in by_columns:
        return []
    kind = EXPERT_BY_COLUMNS if by_columns[type(module)] else EXPERT_BY_ROWS
    number = len(getattr(module, parameter_name))
    return [Layer(f"{name}.{e}", module, kind, parameter_name, e, siblings=f"{name}.*") for e in range(number)]


def kind_of(module: nn.Module) -> LayerKind | None:
    """How a module is seen as a matrix, if it is a product with its weight."""
    if parametrize.is_parametrized(module, "weight"):
        return None
    kinds = [kind for kind in layer_kinds().values() if isinstance(module, kind.layer_type)]
    kept = [kind for kind in kinds if type(module).forward is kind.layer_type.forward]
    if not kept and isinstance(module, nn.Linear) and _acts_as_linear(module):
        kept = kinds
    return kept[0] if kept else None


_OF_LINEAR = frozenset(vars(nn.Linear(1, 1, device="meta")))  # attributes of every instance
_known: dict[object, bool] = {}  # by the class, and the attributes that its instance adds


def _acts_as_linear(module: nn.Linear) -> bool:
    """Whether the forward of a subclass still computes `x W^T + b`, as those of timm, which casts, and Falcon do.

    A forward that quantizes, scales or routes does not.
    """
    own = {name: value for name, value in vars(module).items() if name not in _OF_LINEAR}
    is_simple = all(value is None or isinstance(value, bool | int | float | str) for value in own.values())
    if module._buffers or module._modules or len(module._parameters) > 2 or not is_simple:
        return _computes_linear(module)
    key = type(module), module.bias is None, frozenset(own.items())
    if key not in _known:
        _known[key] = _computes_linear(module)
    return _known[key]


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Try the forward of a subclass on a small copy of the module, so that it cannot change the module's own state."""
    weight = torch.tensor([[0.7, -1.3, 0.1], [-0.4, 0.9, 2.3]], device="cpu")
    bias = None if module.bias is None else torch.tensor([0.6, -1.1], device="cpu")
    x = torch.tensor([[[1.7, -0.3, 50.1], [0.2, 0.9, -1.4]], [[-0.6, 2.2, 0.0], [31.3, -7.7, 0.8]]], device="cpu")
    try:
        stand_in = object.__new__(type(module))
        for name, value in vars(module).items():
            shared = name in _OF_LINEAR and name not in ("_buffers", "_modules", "_parameters")  # hooks do not run
            stand_in.__dict__[name] = (
                value if shared else _copy(value, {id(module.weight): weight, id(module.bias): bias})
            )
        stand_in.__dict__ |= {"in_features": 3, "out_features": 2}
        with torch.autocast("cpu", enabled=False):
            output, expected = type(module).forward(stand_in, x), F.linear(x, weight, bias)
            return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-5)
    except Exception:  # it needs more than a weight and a bias
        return False


def _copy(value: Any, replacements: dict[int, Any]) -> Any:
    """Copy what a forward could write into: tensors, modules and containers of them."""
    is_mutable = isinstance(value, Tensor | nn.Module | dict | list | set | deque)
    return copy.deepcopy(value, replacements) if is_mutable else value
