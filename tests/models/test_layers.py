"""Every layer type as a matrix product; grouped convolutions; subclasses of Linear with a forward of their own."""

import itertools
from copy import deepcopy
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, strategies as st
from lightning.pytorch.plugins.precision import HalfPrecision
from support.disk import same
from support.layers import rng
from support.mlps import Holding
from support.quiet import prune
from support.zoo import seeded
from timm.layers import Conv2dSame, Linear as TimmLinear
from torch import nn
from torch.testing import assert_close
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from wanda_lightning.models import find_layers

MODES = ["zeros", "reflect", "replicate", "circular"]


def layers_of(module):
    found = find_layers(Holding(module.double())).layers
    return [layer for layer in found if layer.module is module]


def assert_is_a_product(layer, x):
    """The layer's rows of the output are its tokens times its matrix."""
    bias = layer.module.bias
    with torch.no_grad():
        product = layer.tokens(x) @ layer.read().T
        expected = layer.outputs(layer.module(x))
        if bias is not None:
            kernel_dimensions = [1] * (layer.module.weight.ndim - 2)
            product += layer.outputs(bias.view(-1, *kernel_dimensions))
    assert_close(product, expected, rtol=1e-10, atol=1e-10)


def assert_round_trip(layer):
    """A matrix is read without gradients and written where it was read, and nothing else changes."""
    before = layer.parameter.detach().clone()
    address = layer.parameter.data_ptr()
    assert not layer.read().requires_grad
    new = torch.randn_like(layer.read())
    layer.write(new)
    assert torch.equal(layer.read(), new)
    assert layer.parameter.data_ptr() == address
    changed = layer.parameter != before
    assert changed.sum() == layer.size
    layer.write(torch.zeros_like(new))
    assert torch.equal(layer.parameter, before.masked_fill(changed, 0))


@st.composite
def convolutions(draw):
    """A convolution, maybe grouped, and what it takes, or a batch of that."""
    make = draw(st.sampled_from([nn.Conv1d, nn.Conv2d, Conv2dSame]))
    dimensions = 1 if make is nn.Conv1d else 2

    def sizes(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(dimensions))

    groups = draw(st.integers(1, 4))
    # With one channel for each of several groups, it would be depthwise.
    channels = groups * draw(st.integers(min(groups, 2), 4))
    options = {
        "stride": sizes(1, 3),
        "dilation": sizes(1, 3),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if make is not Conv2dSame:
        options["padding"] = draw(
            st.one_of(st.sampled_from(["same", "valid"]), st.just(sizes(0, 3)))
        )
        options["padding_mode"] = draw(st.sampled_from(MODES))
        if options["padding"] == "same":
            options["stride"] = 1
    module = make(channels, groups * draw(st.integers(1, 3)), sizes(1, 3), **options)
    size = sizes(4, 8)
    batch = (2,)
    if make is not Conv2dSame:
        batch = draw(st.sampled_from([(), (1,), (2,)]))
        pads = module._reversed_padding_repeated_twice[::-1]
        for dim, (gap, kernel) in enumerate(zip(module.dilation, module.kernel_size, strict=True)):
            assume(size[dim] + sum(pads[2 * dim : 2 * dim + 2]) > gap * (kernel - 1))
    return module, torch.randn(*batch, channels, *size, dtype=torch.float64)


# PyTorch pads an image by itself where the two sides differ, and says so.
EVEN_SAME = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)


@EVEN_SAME
@given(convolutions(), st.integers(1, 2000))
def test_a_convolution_is_a_product_of_its_tokens(case, at_once):
    module, x = case
    layers = layers_of(module)
    names = [f"part.group{index}" for index in range(module.groups)]
    if module.groups == 1:
        names = ["part"]
    assert [layer.name for layer in layers] == names
    assert sum(layer.size for layer in layers) == module.weight.numel()
    images = x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x
    for layer in layers:
        assert_is_a_product(layer, x)
        tokens = layer.tokens(images)
        with mock.patch("wanda_lightning.models.layers._CHUNK_NUMBERS", at_once):
            assert torch.equal(torch.cat(list(layer.token_chunks(images))), tokens)
        assert_close(layer.squares(images).sum(dim=0), tokens.square().sum(dim=0))
        assert len(layer.squares(images)) * len(images) == len(tokens)
        assert_round_trip(layer)


@pytest.mark.parametrize("make", [nn.Linear, lambda d_in, d_out: Conv1D(d_out, d_in)])
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), max_size=3))
def test_a_linear_layer_is_a_product_of_its_tokens(make, d_in, d_out, sizes):
    (layer,) = layers_of(make(d_in, d_out))
    assert layer.read().shape == (d_out, d_in)
    x = torch.randn(*sizes, d_in, dtype=torch.float64)
    assert_is_a_product(layer, x)
    assert layer.tokens(x).shape == (x.numel() // d_in, d_in)
    assert_round_trip(layer)


def test_layers_with_equal_windows_have_equal_tokens():
    """Two convolutions of one input share statistics only where their tokens are the same."""
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    choices = [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3},
        {"kernel_size": (3, 1)},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "dilation": 2},
    ]
    layers = [layers_of(nn.Conv2d(4, width, **choice))[0] for choice in choices for width in (2, 3)]
    tokens = {layer: layer.tokens(x) for layer in layers}
    for layer, other in itertools.product(layers, layers):
        assert (layer.window == other.window) == torch.equal(tokens[layer], tokens[other])


def test_linear_layers_of_one_input_have_equal_tokens():
    (linear,) = layers_of(nn.Linear(8, 2))
    (other,) = layers_of(nn.Linear(8, 3))
    (convolution,) = layers_of(nn.Conv2d(8, 2, 1))
    assert linear.window == other.window != convolution.window


def test_padding_does_not_count_along_one_dimension():
    """As in SqueezeBert, whose layers are convolutions over the tokens."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv1d(16, 16, 1)
            self.second = nn.Conv1d(16, 16, 3)

        def forward(self, x, attention_mask):
            return self.second(self.first(x))

    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = {"x": torch.randn(2, 16, 5).double(), "attention_mask": mask}
    report = prune(seeded(Text).double(), [batch])
    assert [(layer.tokens, layer.note) for layer in report.layers] == [
        (7, ""),
        (6, "padding counted: the attention_mask does not show which inputs are padding"),
    ]


def test_a_convolution_is_no_block_for_its_groups():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    for sequential in ("block", "layer"):
        stops = find_layers(model, sequential).stops
        assert {stop.name: len(stop.layers) for stop in stops} == {"0": 1, "1": 2, "2": 1}


class ByHand(nn.Linear):
    def forward(self, x):
        y = torch.einsum("...i,oi->...o", x.to(self.weight.dtype), self.weight)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


def names_in(*modules):
    return [layer.name for layer in find_layers(nn.Sequential(*modules)).layers]


BIAS = pytest.mark.parametrize("bias", [True, False])
KIND = pytest.mark.parametrize("kind", [TimmLinear, FalconLinear, ByHand])


@BIAS
@KIND
def test_a_forward_of_its_own_that_is_a_linear_layer_is_found(kind, bias):
    """Also on the meta device, and while other dtypes are the default."""
    module = kind(12, 8, bias=bias)
    before = deepcopy(module.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16), HalfPrecision("bf16-true").forward_context():
        assert names_in(module) == ["0"]
    assert same(module.state_dict(), before)
    assert module.in_features == 12
    with torch.device("meta"):
        abstract = kind(12, 8, bias=bias)
    assert names_in(abstract) == ["0"]


@BIAS
@KIND
def test_a_forward_of_its_own_that_is_a_linear_layer_is_pruned_as_one(kind, bias):
    model = nn.Sequential(nn.Linear(6, 12), kind(12, 8, bias=bias), nn.Linear(8, 4))
    plain = deepcopy(model)
    plain[1] = nn.Linear(12, 8, bias=bias)
    plain[1].load_state_dict(model[1].state_dict())
    batches = [torch.randn(4, 6, generator=rng(2))]
    for pruned in (model, plain):
        prune(pruned, batches, 0.5, sequential="none")
    assert same(model.state_dict(), plain.state_dict())


class Counting(nn.Linear):
    """Writes into everything that it has: a buffer, a list, a module inside it, and a parameter."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.register_buffer("steps", torch.zeros(3))
        self.history = []
        self.inner = nn.BatchNorm1d(1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.steps += 1
        self.history.append(x)
        self.inner.num_batches_tracked.add_(1)
        self.scale.data.add_(1)
        return super().forward(x)


def test_trying_out_a_forward_changes_nothing_in_the_module():
    module = Counting(12, 8)
    model = nn.Sequential(nn.Linear(6, 12), module)
    before = deepcopy(model.state_dict())
    for _ in range(2):
        assert names_in(*model) == ["0", "1"]
    assert same(model.state_dict(), before)
    assert module.history == []
    assert (module.in_features, module.out_features) == (12, 8)
