"""Refit against NumPy's least squares."""

import pytest
import torch
from support import reference
from support.layers import correlated_layer, small_layer, solve, statistics
from torch.testing import assert_close

from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import NM, Structured, Unstructured
from wanda_lightning.core.solvers import Refit
from wanda_lightning.core.solvers.refit import refit


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("dampening", [0.01, 0.3])
def test_a_refit_is_numpys_least_squares(pattern, dampening):
    weight, tokens = small_layer()
    pruned, keep = solve(Refit(dampening, steps=200), weight, tokens, pattern=pattern)
    assert torch.equal(keep, pattern(Wanda()(weight, statistics(tokens, Wanda)), 0.5))
    reference.assert_least_squares(pruned, weight, tokens, dampening, keep)


@pytest.mark.parametrize("dampening", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("columns", [1, 4])
def test_a_refit_of_whole_columns_is_torchs_least_squares(dampening, columns):
    """Rows of sqrt(p) below the tokens, with the dense weights as targets, pull toward these weights."""
    weight, tokens = correlated_layer(width=64)
    pattern = Structured(2, columns=columns)
    pruned, keep = solve(Refit(dampening), weight, tokens, pattern=pattern)
    kept = keep[0]
    assert torch.equal(keep, pattern(Wanda()(weight, statistics(tokens, Wanda)), 0.5))
    assert int(kept.sum()) == 32
    assert not pruned[:, ~kept].any()

    kept_tokens = tokens[:, kept]
    pull = (dampening * kept_tokens.square().sum(dim=0).mean()).sqrt()
    left = torch.cat([kept_tokens, pull * torch.eye(32, dtype=torch.float64)])
    right = torch.cat([tokens @ weight.T, pull * weight[:, kept].T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert_close(pruned[:, kept], expected, rtol=1e-5, atol=1e-7)


def test_the_columns_that_are_kept_need_not_be_active():
    weight, tokens = small_layer()
    tokens[:, :20] = 0
    pruned, keep = solve(Refit(), weight, tokens, pattern=Structured(2))
    assert pruned.isfinite().all()
    assert keep[0, 20:].all()
    assert_close(tokens @ pruned.T, tokens @ weight.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_the_returned_error_is_that_of_the_weights(steps):
    weight, tokens = correlated_layer(seed=4)
    gram = tokens.t() @ tokens
    keep = NM(2, 4)(weight.abs(), 0.5)
    fitted, error = refit(weight, weight * keep, keep, gram, steps)
    assert_close(
        error.squeeze(1), (tokens @ (fitted - weight).T).square().sum(dim=0), rtol=1e-9, atol=0
    )
