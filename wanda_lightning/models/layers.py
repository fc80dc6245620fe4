"""Layers that can be pruned, whose weights are read and written as matrices; and the names of modules."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.utils import parametrize

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.statistics import sum_squares
from wanda_lightning.models.expert_stacks import Modules, siblings_of, stacked_experts
from wanda_lightning.models.quantized import is_packed, quantizer
from wanda_lightning.parallel import first_index, local

_CHUNK_NUMBERS = 2**24  # how many numbers the tokens of a convolution may have at once


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class LayerKind:
    """Expresses one type of layer as a matrix product `tokens @ weight.T`. The defaults fit a linear layer."""

    layer_type: type[Module]  # subclasses are included if they keep its forward
    # As (d_out, d_in); a view if the layout allows it.
    read: Callable[[Tensor], Tensor] = lambda weight: weight
    write: Callable[[Tensor, Tensor], object] = lambda weight, matrix: weight.copy_(matrix)
    # The module's input as (tokens, d_in).
    tokens: Callable[[Any, Tensor], Tensor] = lambda module, x: _rows(x)
    outputs: Callable[[Tensor], Tensor] = _rows  # its output as (tokens, d_out)
    # The settings that determine the tokens of an input.
    window: Callable[[Any], object] = lambda module: ()
    rows_first: bool = True  # whether d_out is the weight's first dimension, so that a shard consists of whole rows
    # Dimension of the channels (d_in, d_out) in inputs and outputs, counted from the last.
    channels: int = -1


# Columns are ordered by kernel position, then by channel. If M divides the channels, an N:M group has consecutive
# channels at one position, which is the reduction order of sparse implicit-GEMM convolutions.
def _read_convolution(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).flatten(1)


def _write_convolution(weight: Tensor, matrix: Tensor) -> None:
    _, channels, *kernel = weight.shape
    weight.copy_(matrix.unflatten(1, (*kernel, channels)).movedim(-1, 1))


def _convolution_tokens(layer: Any, images: Tensor) -> Tensor:
    kernel = layer.kernel_size
    if images.ndim == 1 + len(kernel):
        images = images.unsqueeze(0)

    pads = layer._reversed_padding_repeated_twice
    if any(pads):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = F.pad(images, pads, mode=mode)

    windows = images.movedim(1, -1)
    if math.prod(kernel) > 1:
        # Channels last: the copy below then reads consecutive numbers.
        windows = windows.contiguous()
    settings = zip(kernel, layer.stride, layer.dilation, strict=True)
    for dim, (size, step, gap) in enumerate(settings, start=1):
        windows = windows.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]

    # The dimensions are now: batch, output positions, channels, kernel positions.
    channels = 1 + len(kernel)
    return windows.movedim(channels, -1).flatten(channels).flatten(0, channels - 1)


def _conv2d_same_tokens(layer: nn.Conv2d, images: Tensor) -> Tensor:
    from timm.layers.padding import pad_same

    padded = pad_same(images, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    return _convolution_tokens(layer, padded)  # the layer's own padding is 0


def _window(layer: Any) -> object:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode


def _convolution(layer_type: type[Module], dimensions: int) -> LayerKind:
    channels = -1 - dimensions

    def outputs(images: Tensor) -> Tensor:
        return images.movedim(channels, -1).flatten(0, -2)

    return LayerKind(
        layer_type,
        read=_read_convolution,
        write=_write_convolution,
        tokens=_convolution_tokens,
        outputs=outputs,
        window=_window,
        channels=channels,
    )


# The matrix of one expert in a parameter (experts, d_out, d_in) or (experts, d_in, d_out).
EXPERT_BY_ROWS = LayerKind(Module)
EXPERT_BY_COLUMNS = LayerKind(
    Module,
    read=Tensor.t,
    write=lambda weight, matrix: weight.copy_(matrix.t()),
    rows_first=False,
)


@cache
def layer_kinds() -> dict[str, LayerKind]:
    """Return the kinds of layers that can be pruned, by name."""
    from timm.layers.conv2d_same import Conv2dSame
    from transformers.pytorch_utils import Conv1D

    conv2d = _convolution(nn.Conv2d, 2)
    return {
        "Linear": LayerKind(nn.Linear),
        # GPT-2's linear layer, stored as (d_in, d_out).
        "Conv1D": replace(EXPERT_BY_COLUMNS, layer_type=Conv1D),
        "Conv1d": _convolution(nn.Conv1d, 1),
        "Conv2d": conv2d,
        # Its padding depends on the size of the input.
        "Conv2dSame": replace(conv2d, layer_type=Conv2dSame, tokens=_conv2d_same_tokens),
    }


@dataclass(frozen=True)
class Layer:
    """One prunable matrix and the module that contains it."""

    name: str  # of the module; `experts.down_proj.3` for an expert in a parameter, `conv.group3` for a group
    module: Module
    kind: LayerKind
    parameter_name: str = "weight"
    expert: int | None = None  # if the parameter holds one matrix for each expert
    group: tuple[int, int] | None = None  # index and number of groups in a grouped convolution
    siblings: str = ""  # a glob that matches this matrix of every expert

    def read(self) -> Tensor:
        """Return the weight as (d_out, d_in); if it is sharded, the rows of this process."""
        return self.kind.read(self.weight)

    def write(self, matrix: Tensor) -> None:
        """Write a matrix (d_out, d_in) into the weight."""
        self.kind.write(self.weight, matrix)

    def tokens(self, x: Tensor) -> Tensor:
        """Convert the input of the module to (tokens, d_in)."""
        return self.kind.tokens(self.module, self._channels(x))

    def squares(self, images: Tensor) -> Tensor:
        """Sum the squares of a batch of images, and return the tokens of the resulting image.

        Their sum is the sum of the squares of all tokens of the batch, which need not be computed.
        """
        image = sum_squares(self._channels(images)).unsqueeze(0)
        return self.kind.tokens(self.module, image)

    def token_chunks(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the tokens of a few images at a time, since a kernel of 3 x 3 copies each number nine times."""
        token_numbers = images[:1].numel() * math.prod(self.parameter.shape[2:])
        for chunk in images.split(max(1, _CHUNK_NUMBERS // max(1, token_numbers))):
            yield self.tokens(chunk)

    def outputs(self, y: Tensor) -> Tensor:
        """Convert the output of the module to (tokens, d_out)."""
        return self.kind.outputs(self._channels(y))

    def _channels(self, images: Tensor) -> Tensor:
        """Return the channels of this layer's group."""
        if self.group is None:
            return images
        index, groups = self.group
        return images.chunk(groups, self.kind.channels)[index]

    @property
    def window(self) -> object:
        """Settings that determine the tokens: layers with the same input and an equal window have the same tokens."""
        return self.kind.layer_type, self.kind.window(self.module), self.group

    @property
    def parameter(self) -> Tensor:
        """The parameter in its own shape, with all experts or groups."""
        return getattr(self.module, self.parameter_name)

    def own(self, tensor: Tensor) -> Tensor:
        """Return what belongs to this layer in a tensor with the shape of its parameter, or of this process's shard.

        It is empty if the shard holds other experts or groups.
        """
        if self.group is None and self.expert is None:
            return tensor

        whole = self.parameter
        # Where the tensor starts in the parameter, if it is a shard.
        offset = first_index(whole) if len(tensor) < len(whole) else 0
        # An expert is a group of one matrix.
        index, number = self.group or (self.expert or 0, len(whole))
        size = len(whole) // number
        start = index * size - offset
        own = tensor[max(0, start) : max(0, start + size)]
        return own if self.expert is None else own.flatten(0, 1)

    @property
    def weight(self) -> Tensor:
        """The values without gradients; if the parameter is sharded, the shard of this process."""
        return self.own(local(self.parameter.detach()))

    @property
    def bias_name(self) -> str:
        """The name of the parameter with the bias, if there is one; experts have one row each."""
        return "bias" if self.expert is None else f"{self.parameter_name}_bias"

    @property
    def bias(self) -> Tensor | None:
        """The bias, (d_out,), without gradients, or its shard; None if there is none."""
        bias = getattr(self.module, self.bias_name, None)
        if not isinstance(bias, nn.Parameter):
            return None
        if isinstance(bias, DTensor) != isinstance(self.parameter, DTensor):
            return None

        if self._own_shape(bias) != self.shape[:1]:
            return None
        return self.own(local(bias.detach()))

    def _own_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape that `own` would return, unsharded."""
        return tuple(self.own(torch.empty(parameter.shape, device="meta")).shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight in its own layout, unsharded."""
        return self._own_shape(self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), unsharded."""
        d_out, d_in = self.kind.read(torch.empty(self.stored_shape, device="meta")).shape
        return d_out, d_in

    @property
    def width(self) -> int:
        """Number of input channels: d_in without the positions of a kernel."""
        return self.stored_shape[1 if self.kind.rows_first else 0]

    @property
    def size(self) -> int:
        """Number of weights, unsharded."""
        return math.prod(self.stored_shape)


ReadWeight = Callable[[Layer], Tensor]
"""Returns the weight of a layer, which may be read from a disk."""


def all_finite(weight: Tensor) -> bool:
    """Whether none of the numbers is NaN or infinite."""
    # The sum takes one fast pass. It may overflow, so only the slow check of each number decides.
    return bool(weight.sum().isfinite() or weight.isfinite().all())


def refuse_no_values(layer: Layer) -> None:
    """Refuse a layer on the meta device."""
    if layer.parameter.is_meta:
        raise UserError(
            f"model must hold its weights, but {layer.name} is on the meta device. Load the weights first, or "
            "prune the model's folder one block at a time, with prune_from_disk or, in the shell, --stream."
        )


def layers_of(
    name: str,
    module: Module,
    parameter_name: str,
    modules: Modules,
    by_columns: Mapping[type[Module], bool],
) -> list[Layer]:
    """Return the layers that a parameter holds: none, a single one, or one for each expert or group."""
    kind = kind_of(module) if parameter_name == "weight" else None
    if kind:
        groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
        if groups == 1:
            return [Layer(name, module, kind, siblings=siblings_of(name, modules))]
        return [
            Layer(f"{name}.group{index}", module, kind, group=(index, groups))
            for index in range(groups)
        ]

    if parameter_name not in stacked_experts(module) or type(module) not in by_columns:
        return []
    kind = EXPERT_BY_COLUMNS if by_columns[type(module)] else EXPERT_BY_ROWS
    return [
        Layer(f"{name}.{expert}", module, kind, parameter_name, expert, siblings=f"{name}.*")
        for expert in range(len(getattr(module, parameter_name)))
    ]


def kind_of(module: Module) -> LayerKind | None:
    """Return the kind of a module, or None if its forward is not a product with its weight."""
    if parametrize.is_parametrized(module, "weight"):
        return None
    for kind in layer_kinds().values():
        if isinstance(module, kind.layer_type):
            keeps_forward = type(module).forward is kind.layer_type.forward
            if keeps_forward or (isinstance(module, nn.Linear) and computes_linear(module)):
                return kind
    return None


def whole_layer(module: Module) -> Layer | None:
    """Return a module as a layer with one matrix of ordinary numbers; None if it is not one."""
    kind = kind_of(module)
    if kind is None or getattr(module, "groups", 1) != 1:
        return None
    layer = Layer("", module, kind)
    return layer if is_whole(layer) else None


def is_whole(layer: Layer) -> bool:
    """Whether a layer is one matrix of ordinary numbers, neither packed nor quantized."""
    if layer.expert is not None or layer.group is not None:
        return False
    weight = layer.parameter
    is_ordinary = type(weight) in (nn.Parameter, Tensor) and not is_packed(weight)
    return is_ordinary and not quantizer(layer.module, weight)


# What a forward may write into.
_MUTABLE = (Tensor, Module, dict, list, set, deque)


@torch.no_grad()
def computes_linear(module: nn.Linear) -> bool:
    """Whether the forward of the module's class computes `x W^T + b`: a copy with another weight and bias is tried."""
    float32: Any = {"dtype": torch.float32, "device": "cpu"}
    weight = torch.tensor([[0.7, -1.3, 0.1], [-0.4, 0.9, 2.3]], **float32)
    bias = None if module.bias is None else torch.tensor([0.6, -1.1], **float32)
    x = torch.tensor(
        [[[1.7, -0.3, 50.1], [0.2, 0.9, -1.4]], [[-0.6, 2.2, 0.0], [31.3, -7.7, 0.8]]], **float32
    )

    # Neither the constructor nor hooks run.
    copied: nn.Linear = object.__new__(type(module))
    vars(copied).update(vars(module), in_features=3, out_features=2)
    # As the memo of `deepcopy`, this puts the small tensors wherever the copied containers, such as the dictionary of
    # parameters, hold the real ones.
    replaced = {id(module.weight): weight, id(module.bias): bias}
    try:
        for name, value in vars(module).items():
            # Hooks do not run, and perhaps cannot be copied.
            if not name.endswith("hooks") and isinstance(value, _MUTABLE):
                vars(copied)[name] = copy.deepcopy(value, dict(replaced))
        with torch.autocast("cpu", enabled=False):
            output = type(module).forward(copied, x)
            expected = F.linear(x, weight, bias)
            return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-5)
    except Exception:  # it needs more than a weight and a bias
        return False


_COMPILED = "_orig_mod"  # where `torch.compile` keeps the module that it wraps


def uncompiled_name(name: str) -> str:
    """Return the name that a module or parameter would have without `torch.compile`."""
    return ".".join(word for word in name.split(".") if word != _COMPILED)


def named_modules(model: Module) -> dict[str, Module]:
    """Return all modules by name, without the wrappers of `torch.compile` and their parts of the names."""
    return {
        uncompiled_name(name): module
        for name, module in model.named_modules()
        if _COMPILED not in module._modules
    }


def adapted_module(model: Module) -> str | None:
    """Return the name of the first module that PEFT has given an adapter, or None if there is none."""
    for name, module in named_modules(model).items():
        if getattr(type(module), "adapter_layer_names", ()):
            return name
    return None
