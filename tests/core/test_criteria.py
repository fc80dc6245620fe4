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


def test_a_row_and_a_column_of_zeros_score_0_and_not_nan():
    weight, tokens = random_layer()
    weight[3] = 0
    weight[:, 7] = 0
    # Beside an input that is never active, whose other weights score above 0.
    weight[5, 9] = 0
    tokens[:, 9] = 0
    scores = RIA()(weight, statistics(tokens, RIA))
    assert scores.isfinite().all()
    assert torch.equal(scores != 0, weight != 0)


def test_ria_without_activations_is_relative_importance():
    weight, tokens = random_layer()
    quiet = statistics(tokens, RIA)
    loud = statistics(tokens * torch.arange(1, 65), RIA)
    without_inputs = RIA(a=0.0)
    assert torch.equal(without_inputs(weight, quiet), without_inputs(weight, loud))
    assert not torch.equal(RIA()(weight, quiet), RIA()(weight, loud))
