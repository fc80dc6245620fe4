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


def some_row_weights():
    rows = torch.rand(16, generator=rng(3))
    rows[2] = 0
    return rows / rows.mean()


def test_rows_are_weighed_by_the_root_of_their_weights():
    weight, tokens = random_layer()
    row_weights = some_row_weights()
    selection = Selection(Wanda(), WEIGHED, 0.5, row_weights)
    keep = selection.keep(weight, statistics(tokens, Wanda))
    scores = reference.wanda(weight.numpy(), tokens.numpy())
    weighed = scores * row_weights.sqrt().numpy()[:, None]
    assert_keeps(keep, reference.keep_by_layer(weighed, 0.5))
    assert not keep[2].any()


@pytest.mark.parametrize(
    "selection",
    [
        Selection(Wanda(), Unstructured("layer"), 0.5, some_row_weights()),
        Selection(Wanda(), WEIGHED, 0.5),
    ],
)
def test_rows_count_the_same_unless_the_pattern_weighs_them_and_has_weights(selection):
    weight, tokens = random_layer()
    keep = selection.keep(weight, statistics(tokens, Wanda))
    scores = reference.wanda(weight.numpy(), tokens.numpy())
    assert_keeps(keep, reference.keep_by_layer(scores, 0.5))


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
