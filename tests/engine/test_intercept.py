"""Biases that are fitted together with the weights."""

import copy

import pytest
import torch
from torch import nn

from wanda_lightning import ADMM, Refit, prune
from wanda_lightning.core.patterns import Structured


@pytest.fixture
def tokens():
    """Correlated inputs whose means are not zero."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 3


def layer(bias=True):
    torch.manual_seed(1)
    return nn.Linear(16, 8, bias)


def grouped():
    torch.manual_seed(1)
    return nn.Sequential(nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 8, 1, groups=2), nn.Flatten())


@pytest.mark.parametrize("solver", [ADMM, Refit])
@pytest.mark.parametrize("make", [layer, grouped])
def test_the_outputs_are_nearer_with_a_fitted_bias(make, solver, tokens):
    dense, errors = make(), []
    for intercept in (False, True):
        model = copy.deepcopy(dense)
        choices = {"solver": solver(intercept=intercept)}
        report = prune(model, [tokens], 0.75, **choices, progress=False)
        errors.append((dense(tokens) - model(tokens)).square().mean().item())
        assert report.sparsity == 0.75
    assert errors[1] < 0.9 * errors[0]


def test_columns_and_bias_are_the_least_squares_solution(tokens):
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), layer_of(24))
    model = copy.deepcopy(dense)
    prune(model, [tokens], 0.5, pattern=Structured(multiple_of=4), solver=Refit(dampening=1e-7), progress=False)
    hidden, kept = dense[1](dense[0](tokens)), (model[2].weight != 0).any(0)
    assert kept.sum() == 12
    inputs = torch.cat([hidden[:, kept], torch.ones(len(tokens), 1)], dim=1).double()
    expected = torch.linalg.lstsq(inputs, dense(tokens).double(), driver="gelsd").solution.float()
    found = torch.cat([model[2].weight[:, kept], model[2].bias[:, None]], dim=1)
    torch.testing.assert_close(inputs.float() @ found.t(), inputs.float() @ expected, rtol=1e-3, atol=1e-3)


def layer_of(width):
    torch.manual_seed(2)
    return nn.Linear(width, 8)


def test_a_bias_that_other_layers_use_stays(tokens):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].bias = model[0].bias
    before = model[0].bias.clone()
    prune(model, [tokens], 0.5, solver=ADMM(), progress=False)
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


def test_autocast_does_not_round_the_bias(tokens):
    dense = layer()
    model = copy.deepcopy(dense)
    with torch.autocast("cpu", torch.bfloat16):
        prune(model, [tokens], 0.5, solver=ADMM(), progress=False)
    assert (model(tokens) - dense(tokens)).mean(0).abs().max() < 1e-4


@pytest.mark.parametrize("solver", [ADMM, Refit])
@pytest.mark.parametrize("offset", [30, 300, 3000])
def test_large_means_do_not_ruin_the_fit(solver, offset):
    """The centered Gram matrix is a small difference of large numbers in float32."""
    torch.manual_seed(0)
    tokens, dense = torch.randn(4096, 64) + offset * torch.randn(64), nn.Linear(64, 32)
    errors = []
    for intercept in (True, False):
        model = copy.deepcopy(dense)
        prune(model, [tokens], 0.5, solver=solver(intercept=intercept), progress=False)
        errors.append((model(tokens) - dense(tokens)).square().mean())
    assert errors[0] < 1.5 * errors[1]
