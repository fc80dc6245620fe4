"""Gram matrices: dampened, factorized, inverted."""

import logging

import numpy as np
import pytest
import torch
from support.layers import random_layer, solve

from wanda_lightning.core.gram import cholesky, dampened, inverse_factor, relative_error, scaled
from wanda_lightning.core.solvers import SparseGPT


def gram_of(tokens):
    return tokens.t() @ tokens


def test_factors_are_those_of_numpy():
    _, tokens = random_layer(torch.float64)
    gram = gram_of(tokens)
    matrix = gram.numpy() + 0.1 * np.mean(np.diag(gram.numpy())) * np.eye(64)
    np.testing.assert_allclose(dampened(gram, 0.1).numpy(), matrix)
    lower, used = cholesky(gram, 0.1)
    assert used == 0.1
    np.testing.assert_allclose(lower.numpy(), np.linalg.cholesky(matrix))
    upper = inverse_factor(gram, 0.1).numpy()
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(matrix), rtol=1e-9, atol=1e-12)
    scale, correlations = scaled(gram, 0.1)
    np.testing.assert_allclose(np.outer(scale, scale) * correlations.numpy(), matrix)
    np.testing.assert_allclose(correlations.diagonal(), 1)


def test_without_active_inputs_all_weigh_the_same():
    assert torch.equal(dampened(torch.zeros(3, 3), 0.5), torch.eye(3))


def test_an_indefinite_matrix_is_dampened_until_it_is_definite():
    gram = torch.diag(torch.tensor([5.0, 5.0, -1.0]))
    lower, used = cholesky(gram, 0.01)
    assert used == 1
    torch.testing.assert_close(lower @ lower.t(), dampened(gram, 1.0))


def test_too_few_tokens_are_dampened(caplog):
    weight, tokens = random_layer(tokens=3)
    with caplog.at_level(logging.WARNING):
        pruned, _ = solve(SparseGPT(dampening=1e-9), weight, tokens)
    assert "no Cholesky factor with dampening 1e-09, so" in caplog.text
    assert pruned.isfinite().all()
    tokens[0, 0] = float("nan")
    with pytest.raises(ValueError, match="no Cholesky factor, not even with dampening"):
        solve(SparseGPT(), weight, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_relative_error_is_that_of_the_outputs(dtype):
    weight, tokens = random_layer(torch.float64)
    weight = weight.to(dtype)
    pruned, _ = solve(SparseGPT(), weight.float(), tokens.float())
    pruned = pruned.to(dtype)
    outputs = weight.double() @ tokens.t()
    lost = outputs - pruned.double() @ tokens.t()
    expected = float(lost.square().sum() / outputs.square().sum())
    assert relative_error(weight, pruned, gram_of(tokens.float())) == pytest.approx(expected, rel=1e-4)
    assert relative_error(weight, weight, gram_of(tokens)) == 0
    assert relative_error(weight, torch.zeros_like(weight), gram_of(tokens)) == 1
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0


def test_the_relative_error_of_a_tall_layer_is_that_of_evenly_spaced_rows():
    generator = torch.Generator().manual_seed(0)
    weight, tokens = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (600, 50))
    pruned = torch.where(weight.abs() > 0.5, weight, 0)
    outputs, after = ((each[::3] @ tokens.t()) for each in (weight, pruned))
    expected = float((outputs - after).square().sum() / outputs.square().sum())
    assert relative_error(weight, pruned, gram_of(tokens)) == pytest.approx(expected)


def test_the_relative_error_needs_no_autocast_and_is_unknown_if_it_overflows():
    weight, tokens = random_layer(torch.float32)
    pruned = torch.where(weight.abs() > 0.5, weight, 0)
    gram = gram_of(tokens)
    expected = relative_error(weight, pruned, gram)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(weight, pruned, gram) == expected
    assert relative_error(weight, pruned, gram * 1e38) is None
