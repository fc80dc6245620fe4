"""Laws of single criteria; what all of them promise is in `test_contract.py`."""

import pytest
import torch
from support.layers import random_layer, statistics

from wanda_lightning.core.criteria import RIA, Wanda


@pytest.mark.parametrize("criterion", [Wanda(), RIA()], ids=str)
@pytest.mark.parametrize(
    ("dtype", "faint"), [(torch.float32, 1e-20), (torch.float64, 1e-150)], ids=str
)
def test_inputs_that_are_never_active_score_below_the_faintest(criterion, dtype, faint):
    weight, tokens = random_layer(dtype)
    tokens[:, :20] = 0
    tokens[:, 20:40] *= faint
    scores = criterion(weight, statistics(tokens, criterion))
    assert 0 < scores[:, :20].min() <= scores[:, :20].max() < scores[:, 20:].min()


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
    quiet = statistics(tokens, RIA)
    loud = statistics(tokens * torch.arange(1, 65), RIA)
    assert torch.equal(RIA(a=0.0)(weight, quiet), RIA(a=0.0)(weight, loud))
    assert not torch.equal(RIA()(weight, quiet), RIA()(weight, loud))
