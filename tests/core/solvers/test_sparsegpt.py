"""SparseGPT against the optimal brain surgeon's update, computed with NumPy's inverse for each column."""

import numpy as np
import pytest
import torch
from support import reference
from support.layers import WIDE, random_layer, solve

from wanda_lightning.core.criteria import Magnitude, Saliency, Wanda
from wanda_lightning.core.patterns import NM, EqualShare, Unstructured
from wanda_lightning.core.solvers import SparseGPT, ZeroOut


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda(), Saliency()])
def test_an_upfront_mask_gets_the_surgeons_update(criterion):
    # Two blocks of columns.
    weight, tokens = random_layer(torch.float64, shape=(6, 150), tokens=300)
    pruned, keep = solve(SparseGPT(mask="upfront"), weight, tokens, criterion)
    scores = reference.SCORES[type(criterion).__name__.lower()](weight.numpy(), tokens.numpy())
    np.testing.assert_array_equal(keep.numpy(), reference.keep_by_row(scores, 0.5))
    expected = reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, keep.numpy())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "pattern", [Unstructured(), Unstructured("layer"), NM(2, 4), NM(3, 5), NM(1, 2)], ids=str
)
@pytest.mark.parametrize("block_size", [40, 20, 1000])
def test_a_mask_chosen_by_blocks_gets_the_surgeons_update(pattern, block_size):
    weight, tokens = random_layer(torch.float64, shape=(6, 100), tokens=200)
    solver = SparseGPT(block_size=block_size)
    pruned, keep = solve(
        solver, weight, tokens, pattern=pattern, sparsity=getattr(pattern, "sparsity", 0.5)
    )
    expected = reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, keep.numpy())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-7, atol=1e-9)
    if isinstance(pattern, NM):
        # Each group by the weights as they are when it is reached.
        start = pattern.m * 7
        others = keep.numpy().copy()
        others[:, start:] = True
        then = reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, others)
        scores = reference.saliency(then, tokens.numpy())[:, start : start + pattern.m]
        group = reference.keep_n_of_m(scores, pattern.n, pattern.m)
        np.testing.assert_array_equal(keep.numpy()[:, start : start + pattern.m], group)


@pytest.mark.parametrize(
    ("block_size", "sparsity", "shape"),
    [(128, 0.1, WIDE), (128, 0.37, WIDE), (7, 0.6, WIDE), (7, 0.9, WIDE), (128, 0.7, (80, 260))],
)
def test_rows_and_layers_have_their_exact_number_whatever_the_blocks(block_size, sparsity, shape):
    """In floating point, as for methods that choose at once: 0.7 * 80 * 260 is 14559.999999999998."""
    weight, tokens = random_layer(shape=shape, tokens=500)
    _, keep = solve(SparseGPT(block_size=block_size), weight, tokens, sparsity=sparsity)
    assert (~keep).sum(dim=1).tolist() == [int(shape[1] * sparsity)] * shape[0]
    _, keep = solve(
        SparseGPT(block_size=block_size), weight, tokens, None, Unstructured("layer"), sparsity
    )
    assert (~keep).sum() == int(shape[0] * shape[1] * sparsity)


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda(), Saliency()], ids=str)
@pytest.mark.parametrize(("before", "after"), [(0.3, 0.6), (0.5, 0.5), (0.5, 0.51)])
def test_rows_that_wanda_pruned_have_their_exact_number(criterion, before, after):
    """The zeros of a row are unevenly distributed over its blocks of columns."""
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    pruned, _ = solve(ZeroOut(), weight, tokens, sparsity=before)
    again, keep = solve(SparseGPT(), pruned, tokens, criterion, sparsity=after)
    assert (~keep).sum(dim=1).tolist() == [int(300 * after)] * 12
    assert not again[pruned == 0].any()
    if before == after:
        assert torch.equal(again, pruned)


def test_other_patterns_make_up_for_earlier_blocks():
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    _, keep = solve(SparseGPT(), weight, tokens, pattern=EqualShare(), sparsity=0.5)
    assert (~keep).float().mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
def test_zeros_on_the_left_stay_even_if_they_exceed_the_target(pattern):
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    weight[:, :128] = 0
    pruned, _ = solve(
        SparseGPT(), weight, tokens, pattern=pattern, sparsity=getattr(pattern, "sparsity", 0.3)
    )
    assert not pruned[:, :128].any()
    # What is zero already is more than was asked for.
    dense_on_the_right = isinstance(pattern, Unstructured)
    assert bool(pruned[:, 128:256].all()) == dense_on_the_right


@pytest.mark.parametrize(("group", "zeros"), [("row", 0), ("layer", 0), ("layer", 4)])
def test_inputs_that_are_never_active_count(group, zeros):
    """They are all in the last block, and leave less to prune left of it. So do zeros, such as those of whole rows."""
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    tokens[:, 200:], weight[:zeros] = 0, 0
    pruned, keep = solve(SparseGPT(), weight, tokens, pattern=Unstructured(group), sparsity=0.6)
    assert torch.equal(pruned.isfinite() & (pruned != 0), keep)
    assert not keep[:, 200:].any()
    assert (~keep).sum() == 12 * 180
