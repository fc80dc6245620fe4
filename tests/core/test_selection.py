"""A selection is criterion, pattern and sparsity in one object."""

import numpy as np
import pytest
import torch
from support import reference
from support.layers import random_layer, statistics

from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ADMM, Refit, SparseGPT


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


@pytest.mark.parametrize(
    "solver", [SparseGPT(), SparseGPT(mask="upfront"), Refit(), ADMM()], ids=repr
)
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
