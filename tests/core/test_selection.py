"""A selection is criterion, pattern and sparsity in one object."""

import pytest
import torch
from support import reference
from support.layers import random_layer, rng, statistics
from support.reference import assert_keeps

from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ADMM, Refit, SparseGPT

WEIGHED = Unstructured("layer", weigh_rows=True)
ROWS = torch.rand(16, generator=rng(3))
ROWS[2] = 0
ROWS /= ROWS.mean()


@pytest.mark.parametrize(
    ("selection", "factors"),
    [
        (Selection(Wanda(), WEIGHED, 0.5, ROWS), ROWS.sqrt()),
        (Selection(Wanda(), WEIGHED, 0.5), torch.ones(16)),
        (Selection(Wanda(), Unstructured("layer"), 0.5, ROWS), torch.ones(16)),
    ],
)
def test_a_pattern_that_weighs_rows_does_so_by_the_root_of_their_weights(selection, factors):
    """Without weights, or with another pattern, all rows count the same."""
    weight, tokens = random_layer()
    keep = selection.keep(weight, statistics(tokens, Wanda))
    scores = reference.wanda(weight.numpy(), tokens.numpy())
    assert_keeps(keep, reference.keep_by_layer(scores * factors.numpy()[:, None], 0.5))


@pytest.mark.parametrize(
    "solver", [SparseGPT(), SparseGPT(mask="upfront"), Refit(), ADMM()], ids=repr
)
def test_every_solver_weighs_rows(solver):
    """A row whose output does not matter loses more weights, one that matters most loses fewer."""
    weight, tokens = random_layer()
    rows = torch.ones(len(weight))
    rows[0] = 100.0
    rows[1] = 0.01
    weighed = Selection(solver.own_criterion, WEIGHED, 0.5, rows / rows.mean())
    plain = Selection(solver.own_criterion, Unstructured("layer"), 0.5)
    inputs = statistics(tokens, solver.own_criterion, solver)
    _, keep = solver(weight, inputs, weighed)
    _, keep_plain = solver(weight, inputs, plain)
    assert keep.float().mean() == pytest.approx(0.5, abs=0.01)
    assert keep[0].sum() > keep_plain[0].sum()
    assert keep[1].sum() < keep_plain[1].sum()
