"""Laws of single criteria; what all of them promise is in `test_contract.py`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layers import random_layer, statistics

from wanda_lightning.core.criteria import RIA, Magnitude, Saliency, Wanda
from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ZeroOut


def test_what_unstructured_pruning_compares_in_the_papers():
    groups = {criterion: criterion.group for criterion in (Magnitude(), Wanda(), RIA(), Saliency())}
    assert groups == {Magnitude(): "layer", Wanda(): "row", RIA(): "row", Saliency(): "layer"}


@pytest.mark.parametrize("dampening", [0.0, -1.0])
def test_saliency_needs_dampening(dampening):
    with pytest.raises(ValueError, match="dampening of Saliency must be a number above 0"):
        Saliency(dampening)


@pytest.mark.parametrize("criterion", [Wanda(), RIA()], ids=str)
@pytest.mark.parametrize(("dtype", "faint"), [(torch.float32, 1e-20), (torch.float64, 1e-150)], ids=str)
def test_inputs_that_are_never_active_score_below_the_faintest(criterion, dtype, faint):
    weight, tokens = random_layer(dtype)
    tokens[:, :20] = 0
    tokens[:, 20:40] *= faint
    scores = criterion(weight, statistics(tokens, criterion))
    assert 0 < scores[:, :20].min() <= scores[:, :20].max() < scores[:, 20:].min()


# ---- laws of Wanda


@given(st.integers(0, 2**32 - 1), st.integers(-10, 10), st.integers(-10, 10), st.integers(0, 7))
def test_wanda_rows_do_not_change_with_the_scale_of_all_inputs_or_of_a_row(seed, input_power, row_power, row):
    weight, tokens = random_layer(seed=seed, shape=(8, 24), tokens=10)
    inputs = statistics(tokens, Wanda)
    keep = Unstructured()(Wanda()(weight, inputs), 0.5)
    scaled = weight.clone()
    scaled[row] *= 2.0**row_power
    assert torch.equal(Unstructured()(Wanda()(scaled, inputs), 0.5), keep)
    louder = statistics(tokens * 2.0**input_power, Wanda)
    assert torch.equal(Unstructured()(Wanda()(weight, louder), 0.5), keep)
    assert torch.equal(NM(2, 4)(Wanda()(scaled, louder), 0.5), NM(2, 4)(Wanda()(weight, inputs), 0.5))


@given(st.integers(0, 2**32 - 1))
def test_permuted_inputs_permute_the_scores_of_wanda(seed):
    weight, tokens = random_layer(seed=seed, shape=(4, 24), tokens=10)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    scores = Wanda()(weight, statistics(tokens, Wanda))
    permuted = Wanda()(weight[:, order], statistics(tokens[:, order], Wanda))
    torch.testing.assert_close(permuted, scores[:, order], rtol=1e-6, atol=0)


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


@given(st.integers(0, 2**32 - 1), st.integers(-10, 10))
def test_ria_does_not_change_with_the_scale_of_the_weights(seed, power):
    weight, tokens = random_layer(seed=seed, shape=(8, 24), tokens=10)
    inputs = statistics(tokens, RIA)
    assert torch.equal(RIA()(weight * 2.0**power, inputs), RIA()(weight, inputs))


def test_ria_without_activations_is_relative_importance():
    weight, tokens = random_layer()
    quiet, loud = statistics(tokens, RIA), statistics(tokens * torch.arange(1, 65), RIA)
    assert torch.equal(RIA(a=0.0)(weight, quiet), RIA(a=0.0)(weight, loud))
    assert not torch.equal(RIA()(weight, quiet), RIA()(weight, loud))
    for a in (-0.5, float("nan")):
        with pytest.raises(ValueError, match="a of RIA must be a number of at least 0"):
            RIA(a=a)
