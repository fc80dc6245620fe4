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


@pytest.fixture
def layer_with_zeros():
    """RIA's scores of a weight with a row and a column of zeros, and an inactive input, number 9."""
    weight, tokens = random_layer()
    weight[3] = 0
    weight[:, 7] = 0
    weight[5, 9] = 0
    tokens[:, 9] = 0
    return weight, RIA()(weight, statistics(tokens, RIA))


def test_a_row_and_a_column_of_zeros_score_0_and_not_nan(layer_with_zeros):
    weight, scores = layer_with_zeros
    assert scores.isfinite().all()
    assert torch.equal(scores != 0, weight != 0)


def test_the_weights_of_an_inactive_input_score_lowest_above_0(layer_with_zeros):
    weight, scores = layer_with_zeros
    assert scores[weight != 0].min() == scores[:, 9].max()


def test_ria_without_activations_is_relative_importance():
    weight, tokens = random_layer()
    quiet = statistics(tokens, RIA)
    loud = statistics(tokens * torch.arange(1, 65), RIA)
    without_inputs = RIA(a=0.0)
    assert torch.equal(without_inputs(weight, quiet), without_inputs(weight, loud))
    assert not torch.equal(RIA()(weight, quiet), RIA()(weight, loud))
