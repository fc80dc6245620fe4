"""Subclasses of Linear are pruned if their own forward still computes a linear layer; trying it leaves no trace."""

import copy

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from timm.layers import Linear as TimmLinear
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from wanda_lightning import prune
from wanda_lightning.models import find_layers


class ByHand(nn.Linear):
    def forward(self, x):
        y = torch.einsum("...i,oi->...o", x.to(self.weight.dtype), self.weight)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.01


class Routing(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Decoupled(nn.Linear):
    def __init__(self, d_in, d_out, bias=True):
        super().__init__(d_in, d_out, bias)
        self.more = nn.Linear(d_in, d_out)

    def forward(self, x):
        return super().forward(x) + self.more(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [TimmLinear, FalconLinear, ByHand])
def test_a_forward_of_its_own_that_is_a_linear_layer(kind, bias):
    module = kind(12, 8, bias=bias)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = nn.Sequential(nn.Linear(6, 12), module, nn.Linear(8, 4))
    with torch.device("meta"):
        abstract = kind(12, 8, bias=bias)
    assert [layer.name for layer in find_layers(nn.Sequential(abstract)).layers] == ["0"]
    with torch.autocast("cpu", dtype=torch.bfloat16), HalfPrecision("bf16-true").forward_context():
        assert [layer.name for layer in find_layers(model).layers] == ["0", "1", "2"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.in_features == 12
    plain = copy.deepcopy(model)
    plain[1] = nn.Linear(12, 8, bias=bias)
    plain[1].load_state_dict(module.state_dict())
    for each in (model, plain):
        batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(2))]
        prune(each, batches, 0.5, sequential="none", progress=False)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Scaled, Routing, Decoupled])
def test_a_forward_of_its_own_that_is_something_else(kind):
    (reason,) = [m.detail for m in find_layers(nn.Sequential(nn.Linear(6, 12), kind(12, 8))).skipped]
    assert reason == f"tests.models.test_linear_subclasses.{kind.__name__} overrides the forward of Linear"


class Counting(nn.Linear):
    """Writes into everything that it has: a buffer, a list, a module inside it, and a parameter."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.register_buffer("steps", torch.zeros(3))
        self.history, self.inner, self.scale = [], nn.BatchNorm1d(1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.steps += 1
        self.history.append(x)
        self.inner.num_batches_tracked.add_(1)
        self.scale.data.add_(1)
        return super().forward(x)


def test_trying_out_a_forward_changes_nothing_in_the_module():
    module = Counting(12, 8)
    model = nn.Sequential(nn.Linear(6, 12), module)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert [layer.name for layer in find_layers(model).layers] == ["0", "1"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert module.history == []
    assert (module.in_features, module.out_features) == (12, 8)
