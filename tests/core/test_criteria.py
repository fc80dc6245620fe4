"""Laws of single criteria; what all of them promise is in `test_contract.py`."""

import pytest
import torch
from support.layers import random_layer, statistics

from wanda_lightning.core.criteria import RIA, Wanda
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ZeroOut


@pytest.mark.parametrize("criterion", [Wanda(), RIA()], ids=str)
@pytest.mark.parametrize(("dtype", "faint"), [(torch.float32, 1e-20), (torch.float64, 1e-150)], ids=str)
def test_inputs_that_are_never_active_score_below_the_faintest(criterion, dtype, faint):
    weight, tokens = random_layer(dtype)
    tokens[:, :20] = 0
    tokens[:, 20:40] *= faint
    scores = criterion(weight, statistics(tokens, criterion))
    assert 0 < scores[:, :20].min() <= scores[:, :20].max() < scores[:, 20:].min()


# ---- laws of Wanda


def test_wanda_prunes_a_dead_input_first():
    weight, tokens = random_layer()
    tokens[:, [5, 40]] = 0
    weight[:, [5, 40]] *= 1e6
    _, keep = ZeroOut()(weight, statistics(tokens, Wanda), Selection(Wanda(), Unstructured(), 2 / 64))
    assert keep.all(dim=0).logical_not().nonzero().flatten().tolist() == [5, 40]


def test_scores_of_half_precision_are_in_float32():
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    tokens = torch.tensor([[1.0, 1.0], [0.0, 0.05]], dtype=torch.bfloat16)
    scores = Wanda()(weight, statistics(tokens, Wanda))
    assert scores[0, 0] < scores[0, 1]
    assert scores.bfloat16()[0, 0] == scores.bfloat16()[0, 1]


# ---- laws of RIA


def test_ria_of_a_row_and_a_column_of_zeros():
    """They score 0, not NaN; the other weights of an inactive input score above 0."""
    weight, tokens = random_layer()
    weight[3], weight[:, 7], weight[5, 9] = 0, 0, 0
    tokens[:, 9] = 0
    scores = RIA()(weight, statistics(tokens, RIA))
    assert scores.isfinite().all()
    assert torch.equal(scores != 0, weight != 0)
    assert scores[weight != 0].min() == scores[:, 9].max()


def test_ria_without_activations_is_relative_importance():
    weight, tokens = random_layer()
    quiet, loud = statistics(tokens, RIA), statistics(tokens * torch.arange(1, 65), RIA)
    assert torch.equal(RIA(a=0.0)(weight, quiet), RIA(a=0.0)(weight, loud))
    assert not torch.equal(RIA()(weight, quiet), RIA()(weight, loud))
