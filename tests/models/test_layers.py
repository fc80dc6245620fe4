"""Every layer type as a matrix product; grouped convolutions; subclasses of Linear with a forward of their own."""

import itertools
from copy import deepcopy
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st
from lightning.pytorch.plugins.precision import HalfPrecision
from support.convolutions import convolutions
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


# PyTorch pads an image by itself where the two sides differ, and says so.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(convolutions(), st.sampled_from([(), (1,), (2,)]), st.integers(1, 2000))
def test_a_convolution_is_a_product_of_its_tokens(case, batch, at_once):
    module, shape = case
    if isinstance(module, Conv2dSame):  # it takes batches only
        batch = (2,)
    x = torch.randn(*batch, *shape, dtype=torch.float64)
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
    linear, other = (layers_of(nn.Linear(8, width))[0] for width in (2, 3))
    assert linear.window == other.window != layers[0].window


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [TimmLinear, FalconLinear, ByHand])
def test_a_forward_of_its_own_that_is_a_linear_layer_is_pruned_as_one(kind, bias):
    """It is found also on the meta device, and while other dtypes are the default."""
    with torch.device("meta"):
        assert names_in(kind(12, 8, bias=bias)) == ["0"]
    model = nn.Sequential(nn.Linear(6, 12), kind(12, 8, bias=bias), nn.Linear(8, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16), HalfPrecision("bf16-true").forward_context():
        assert names_in(*model) == ["0", "1", "2"]
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
