"""A selection is criterion, pattern and sparsity in one object."""

import numpy as np
import pytest
import torch
from support import reference
from support.layers import random_layer, statistics

from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ADMM, Refit, SparseGPT


def test_it_keeps_what_its_pattern_keeps_of_its_criterions_scores():
    weight, tokens = random_layer()
    scores = reference.wanda(weight.numpy(), tokens.numpy())
    for pattern, sparsity in ((Unstructured(), 0.3), (Unstructured("layer"), 0.7), (NM(2, 4), 0.5)):
        keep = Selection(Wanda(), pattern, sparsity).keep(weight, statistics(tokens, Wanda))
        np.testing.assert_array_equal(keep.numpy(), reference.keep(pattern, scores, sparsity))


def test_selections_are_values():
    assert Selection(Wanda(), NM(2, 4), 0.5) == Selection(Wanda(), NM(2, 4), 0.5)
    assert Selection(Wanda(), NM(2, 4), 0.5) != Selection(Wanda(), NM(1, 4), 0.75)


def test_rows_are_weighed_by_the_root_of_their_weights():
    weight, tokens = random_layer()
    rows = torch.rand(len(weight), generator=torch.Generator().manual_seed(3))
    rows[2] = 0
    rows = rows / rows.mean()
    scores = reference.wanda(weight.numpy(), tokens.numpy()) * rows.sqrt().numpy()[:, None]
    pattern = Unstructured("layer", weigh_rows=True)
    inputs = statistics(tokens, Wanda)
    keep = Selection(Wanda(), pattern, 0.5, rows).keep(weight, inputs)
    np.testing.assert_array_equal(keep.numpy(), reference.keep(Unstructured("layer"), scores, 0.5))
    assert not keep[2].any()
    plain = Selection(Wanda(), Unstructured("layer"), 0.5, rows).keep(weight, inputs)
    assert torch.equal(plain, Selection(Wanda(), pattern, 0.5).keep(weight, inputs))
    assert not torch.equal(plain, keep)


@pytest.mark.parametrize("solver", [SparseGPT(), SparseGPT(mask="upfront"), Refit(), ADMM()], ids=repr)
def test_every_solver_weighs_rows(solver):
    """A row whose output does not matter loses more weights, one that matters most loses fewer."""
    weight, tokens = random_layer()
    rows = torch.ones(len(weight))
    rows[0], rows[1] = 100.0, 0.01
    pattern = Unstructured("layer", weigh_rows=True)
    inputs = statistics(tokens, solver.own_criterion, solver)
    selection = Selection(solver.own_criterion, pattern, 0.5, rows / rows.mean())
    _, keep = solver(weight, inputs, selection)
    _, plain = solver(weight, inputs, Selection(solver.own_criterion, Unstructured("layer"), 0.5))
    assert keep.float().mean() == pytest.approx(0.5, abs=0.01)
    assert keep[0].sum() > plain[0].sum()
    assert keep[1].sum() < plain[1].sum()
