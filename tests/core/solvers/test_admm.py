"""ADMM against its iterations written out in NumPy."""

from functools import partial

import numpy as np
import pytest
import torch
from support import reference
from support.layers import correlated_layer, output_error, random_layer, rng, small_layer, solve
from support.reference import assert_keeps

from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.solvers import ADMM, ZeroOut


def by_hand(weight, tokens, solver, pattern, factor=1):
    """The mask after the iterations one by one, with `factor` times each rho."""
    first, last = solver.rho
    rhos = factor * np.geomspace(first, last, solver.iterations)
    choose = partial(reference.keep, pattern, sparsity=0.5)
    return reference.admm(weight.numpy(), tokens.numpy(), solver.dampening, rhos, choose)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("iterations", [1, 6, 10])
def test_the_mask_is_that_of_the_iterations_one_by_one(pattern, iterations):
    weight, tokens = correlated_layer()
    solver = ADMM(iterations=iterations)
    _, keep = solve(solver, weight, tokens, pattern=pattern)
    assert_keeps(keep, by_hand(weight, tokens, solver, pattern))


def test_a_factorization_that_is_retried_changes_rho_everywhere(monkeypatch):
    """The factor and the pull toward the masked copy must have the same rho."""
    weight, tokens = correlated_layer()
    original = torch.linalg.cholesky_ex
    calls = []

    def fail_first(matrix, out):
        calls.append(matrix)
        original(matrix, out=out)
        if len(calls) == 1:
            out[1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_first)
    solver = ADMM(iterations=3)
    _, keep = solve(solver, weight, tokens)
    assert len(calls) == 4
    assert_keeps(keep, by_hand(weight, tokens, solver, Unstructured(), factor=10))


def test_wandas_mask_is_used_if_inputs_do_not_correlate():
    weight, _ = random_layer(torch.float64, shape=(6, 32))
    random = torch.randn(64, 32, generator=rng()).double()
    uncorrelated = torch.linalg.qr(random).Q
    tokens = uncorrelated * torch.logspace(-2, 1, 32, dtype=torch.float64)
    tokens[0] += 1e-3  # inputs that correlate a little mislead ADMM
    pruned, keep = solve(ADMM(), weight, tokens)
    zeroed, wanda = solve(ZeroOut(), weight, tokens)
    assert torch.equal(keep, wanda)
    assert output_error(weight, pruned, tokens) <= output_error(weight, zeroed, tokens)


def test_the_weights_are_the_least_squares_of_the_mask():
    weight, tokens = small_layer()
    pruned, keep = solve(ADMM(dampening=0.05, refit_steps=200), weight, tokens)
    reference.assert_least_squares(pruned, weight, tokens, 0.05, keep)
