"""Permutations for N:M, against an exhaustive search and a slow count of what groups keep."""

from itertools import combinations

import pytest
import torch
from support.layers import rng

from wanda_lightning import NM, Assignment, EqualShare, NoPermutation, Unstructured
from wanda_lightning.core import permutation
from wanda_lightning.core.permutation import kept_score


def random_scores(d_out, d_in):
    generator = rng()
    column_scale = torch.rand(d_in, generator=generator)
    return torch.rand(d_out, d_in, generator=generator) * column_scale


def kept_slowly(scores, order, n, m):
    """Sum up the n largest scores of every group of every row."""
    total = 0.0
    for row in scores[:, order].tolist():
        for start in range(0, len(row), m):
            total += sum(sorted(row[start : start + m])[-n:])
    return total


def groupings(columns, m):
    """Yield every way to divide columns into groups of m, as an order of the columns."""
    if not columns:
        yield ()
        return

    first, *rest = columns
    for others in combinations(rest, m - 1):
        left = [column for column in rest if column not in others]
        for order in groupings(left, m):
            yield (first, *others, *order)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_an_order_of_eight_inputs_is_nearly_the_best(n, m):
    scores = random_scores(6, 8)
    best = max(kept_slowly(scores, order, n, m) for order in groupings(range(8), m))
    order = Assignment(iterations=64)(scores, NM(n, m))
    kept = kept_slowly(scores, order, n, m)
    assert 0.99 * best <= kept <= 1.00001 * best
    assert kept_score(scores, order, NM(n, m)) == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("chunk", [512, 8])
def test_it_permutes_and_keeps_more_with_each_iteration(monkeypatch, chunk):
    monkeypatch.setattr(permutation, "_CHUNK", chunk)
    scores = random_scores(16, 128)
    pattern = NM(2, 4)
    kept = [kept_score(scores, torch.arange(128), pattern)]
    for iterations in (1, 2, 4, 8, 16):
        order = Assignment(iterations)(scores, pattern)
        assert order.sort().values.tolist() == list(range(128))
        kept.append(kept_score(scores, order, pattern))
    assert kept == sorted(kept)
    assert kept[-1] > 1.01 * kept[0]


@pytest.mark.parametrize("scores", [torch.ones(3, 16), torch.zeros(3, 16), torch.rand(3, 4)])
def test_an_order_that_cannot_be_improved_stays(scores):
    assert torch.equal(Assignment()(scores, NM(2, 4)), torch.arange(scores.shape[1]))


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), EqualShare()])
def test_a_pattern_without_groups_is_refused(pattern):
    assert "does not depend on the order of the inputs" in Assignment().why_not(pattern)
    assert Assignment().why_not(NM(2, 4)) is None


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_no_permutation_leaves_the_order_with_any_pattern(pattern):
    assert NoPermutation().why_not(pattern) is None
    assert torch.equal(NoPermutation()(random_scores(3, 8), pattern), torch.arange(8))
