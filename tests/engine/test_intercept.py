"""Biases that are fitted together with the weights."""

import copy

import pytest
import torch
from torch import nn

from wanda_lightning import ADMM, Refit, prune
from wanda_lightning.core.patterns import Structured

RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randn(200, 16, generator=RANDOM) @ torch.randn(16, 16, generator=RANDOM) + 3
"""Correlated inputs whose means are not zero."""


def layer(d_in=16):
    torch.manual_seed(1)
    return nn.Linear(d_in, 8)


def grouped():
    torch.manual_seed(1)
    return nn.Sequential(nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 8, 1, groups=2), nn.Flatten())


def far(offset):
    torch.manual_seed(0)
    return torch.randn(4096, 16) + offset * torch.randn(16)


@pytest.mark.parametrize("solver", [ADMM, Refit])
@pytest.mark.parametrize(
    ("make", "inputs", "most"),
    [
        (layer, TOKENS, 0.9),
        (grouped, TOKENS, 0.9),
        # The centered Gram matrix is a small difference of large numbers in float32.
        *((layer, far(offset), 1.5) for offset in (30, 300, 3000)),
    ],
)
def test_the_outputs_are_nearer_with_a_fitted_bias_which_large_means_do_not_ruin(make, inputs, most, solver):
    dense, errors = make(), []
    for intercept in (False, True):
        model = copy.deepcopy(dense)
        report = prune(model, [inputs], 0.75, solver=solver(intercept=intercept), progress=False)
        errors.append((dense(inputs) - model(inputs)).square().mean().item())
        assert report.sparsity == 0.75
    assert errors[1] < most * errors[0]


def test_columns_and_bias_are_the_least_squares_solution():
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), layer(24))
    model = copy.deepcopy(dense)
    prune(model, [TOKENS], 0.5, pattern=Structured(multiple_of=4), solver=Refit(dampening=1e-7), progress=False)
    hidden, kept = dense[1](dense[0](TOKENS)), (model[2].weight != 0).any(0)
    assert kept.sum() == 12
    inputs = torch.cat([hidden[:, kept], torch.ones(len(TOKENS), 1)], dim=1).double()
    expected = torch.linalg.lstsq(inputs, dense(TOKENS).double(), driver="gelsd").solution.float()
    found = torch.cat([model[2].weight[:, kept], model[2].bias[:, None]], dim=1)
    torch.testing.assert_close(inputs.float() @ found.t(), inputs.float() @ expected, rtol=1e-3, atol=1e-3)


def test_a_bias_that_other_layers_use_stays():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].bias = model[0].bias
    before = model[0].bias.clone()
    prune(model, [TOKENS], 0.5, solver=ADMM(), progress=False)
    assert torch.equal(model[0].bias, before)


@pytest.mark.parametrize("method", ["admm", "refit"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_layer_whose_inputs_never_change_is_pruned(method, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    tokens = torch.full((64, 8), value)
    expected = model(tokens)
    prune(model, [tokens], 0.5, method=method, progress=False)
    assert (model[2].weight == 0).sum() == 64
    assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_autocast_does_not_round_the_bias():
    dense = layer()
    model = copy.deepcopy(dense)
    with torch.autocast("cpu", torch.bfloat16):
        prune(model, [TOKENS], 0.5, solver=ADMM(), progress=False)
    assert (model(TOKENS) - dense(TOKENS)).mean(0).abs().max() < 1e-4
