"""SparseGPT against the optimal brain surgeon's update, computed with NumPy's inverse for each column."""

import pytest
import torch
from numpy.testing import assert_allclose
from support import reference
from support.layers import WIDE, random_layer, small_layer, solve, wide_layer
from support.reference import assert_keeps

from wanda_lightning.core.criteria import Magnitude, Saliency, Wanda
from wanda_lightning.core.patterns import NM, EqualShare, Unstructured
from wanda_lightning.core.solvers import SparseGPT, ZeroOut


def surgeon(weight, tokens, keep):
    """The weights left by the optimal brain surgeon, with SparseGPT's dampening."""
    return reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, keep.numpy())


def assert_updated(pruned, weight, tokens, keep):
    assert_allclose(pruned.numpy(), surgeon(weight, tokens, keep), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda(), Saliency()])
def test_an_upfront_mask_gets_the_surgeons_update(criterion):
    # Two blocks of columns.
    weight, tokens = small_layer(shape=(6, 150), tokens=300)
    pruned, keep = solve(SparseGPT(mask="upfront"), weight, tokens, criterion)
    scores = reference.SCORES[type(criterion).__name__.lower()](weight.numpy(), tokens.numpy())
    assert_keeps(keep, reference.keep_by_row(scores, 0.5))
    assert_updated(pruned, weight, tokens, keep)


N_OF_M = [NM(2, 4), NM(3, 5), NM(1, 2)]
EVERY_BLOCK_SIZE = pytest.mark.parametrize("block_size", [40, 20, 1000])


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), *N_OF_M], ids=str)
@EVERY_BLOCK_SIZE
def test_a_mask_chosen_by_blocks_gets_the_surgeons_update(pattern, block_size):
    weight, tokens = small_layer(shape=(6, 100))
    pruned, keep = solve(SparseGPT(block_size=block_size), weight, tokens, pattern=pattern)
    assert_updated(pruned, weight, tokens, keep)


@pytest.mark.parametrize("pattern", N_OF_M, ids=str)
@EVERY_BLOCK_SIZE
def test_a_group_is_chosen_by_the_weights_as_they_are_when_it_is_reached(pattern, block_size):
    weight, tokens = small_layer(shape=(6, 100))
    _, keep = solve(SparseGPT(block_size=block_size), weight, tokens, pattern=pattern)
    group = slice(pattern.m * 7, pattern.m * 8)
    keep_before = keep.clone()
    keep_before[:, group.start :] = True
    then = surgeon(weight, tokens, keep_before)
    scores = reference.saliency(then, tokens.numpy())[:, group]
    assert_keeps(keep[:, group], reference.keep_n_of_m(scores, pattern.n, pattern.m))


@pytest.mark.parametrize(
    ("block_size", "sparsity", "shape"),
    [(128, 0.1, WIDE), (128, 0.37, WIDE), (7, 0.6, WIDE), (7, 0.9, WIDE), (128, 0.7, (80, 260))],
)
def test_rows_and_layers_have_their_exact_number_whatever_the_blocks(block_size, sparsity, shape):
    """In floating point, as for methods that choose at once: 0.7 * 80 * 260 is 14559.999999999998."""
    d_out, d_in = shape
    weight, tokens = random_layer(shape=shape, tokens=500)
    solver = SparseGPT(block_size=block_size)
    _, by_row = solve(solver, weight, tokens, sparsity=sparsity)
    assert (~by_row).sum(dim=1).tolist() == [int(d_in * sparsity)] * d_out
    _, by_layer = solve(solver, weight, tokens, None, Unstructured("layer"), sparsity)
    assert (~by_layer).sum() == int(d_out * d_in * sparsity)


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda(), Saliency()], ids=str)
@pytest.mark.parametrize(("before", "after"), [(0.3, 0.6), (0.5, 0.5), (0.5, 0.51)])
def test_rows_that_wanda_pruned_have_their_exact_number(criterion, before, after):
    """The zeros of a row are unevenly distributed over its blocks of columns."""
    weight, tokens = wide_layer()
    pruned, _ = solve(ZeroOut(), weight, tokens, sparsity=before)
    again, keep = solve(SparseGPT(), pruned, tokens, criterion, sparsity=after)
    assert (~keep).sum(dim=1).tolist() == [int(300 * after)] * 12
    assert not again[pruned == 0].any()
    if before == after:
        assert torch.equal(again, pruned)


def test_other_patterns_make_up_for_earlier_blocks():
    weight, tokens = wide_layer()
    _, keep = solve(SparseGPT(), weight, tokens, pattern=EqualShare(), sparsity=0.5)
    assert (~keep).float().mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
def test_zeros_on_the_left_stay_even_if_they_exceed_the_target(pattern):
    weight, tokens = wide_layer()
    weight[:, :128] = 0
    pruned, _ = solve(SparseGPT(), weight, tokens, pattern=pattern, sparsity=0.3)
    assert not pruned[:, :128].any()
    # More weights than asked for are zero already, so only 2:4 prunes any to their right.
    assert bool(pruned[:, 128:256].all()) == (pattern != NM(2, 4))


@pytest.mark.parametrize(("group", "zeros"), [("row", 0), ("layer", 0), ("layer", 4)])
def test_inputs_that_are_never_active_count(group, zeros):
    """They are all in the last block, and leave less to prune left of it. So do zeros, such as those of whole rows."""
    weight, tokens = wide_layer()
    tokens[:, 200:] = 0
    weight[:zeros] = 0
    pruned, keep = solve(SparseGPT(), weight, tokens, pattern=Unstructured(group), sparsity=0.6)
    assert torch.equal(pruned.isfinite() & (pruned != 0), keep)
    assert not keep[:, 200:].any()
    assert (~keep).sum() == 12 * 180
