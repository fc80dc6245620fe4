"""Patterns keep exactly what a stable sort of each group would keep."""

import re

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import reference

from wanda_lightning.core.keep_largest import keep_largest
from wanda_lightning.core.patterns import NM, PATTERNS, EqualShare, Unstructured, pattern_named

N_OF_M = [(2, 4), (4, 8), (1, 4), (3, 4), (2, 8), (1, 2), (5, 32)]
sparsities = st.floats(0, 1, exclude_max=True)


@st.composite
def score_matrices(draw, multiple_of=1, multiples=40):
    """Scores of few or many levels: 1 makes all equal, 3 makes many ties, 10000 almost none."""
    rows, d_in = draw(st.integers(1, 6)), multiple_of * draw(st.integers(1, multiples))
    levels = draw(st.sampled_from([1, 3, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(0, levels, (rows, d_in), generator=generator).float()


def distinct_scores(seed, rows, d_in, dtype=torch.float32):
    """The numbers 1 ... rows * d_in in random order."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + torch.randperm(rows * d_in, generator=generator)).to(dtype).reshape(rows, d_in)


def assert_keeps(keep, expected):
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), expected)


def non_contiguous_views(scores):
    """The same scores laid out in other ways."""
    yield scores.t().contiguous().t()
    yield scores.repeat_interleave(2, dim=1)[:, ::2]
    yield torch.cat([scores, scores], dim=1)[:, scores.shape[1] :]


# ---- keep_largest


@given(score_matrices(), st.data())
@settings(max_examples=150)
def test_keep_largest_is_a_stable_sort(scores, data):
    count = data.draw(st.integers(0, scores.shape[1]))
    keep = keep_largest(scores, count)
    assert (keep.sum(dim=1) == count).all()
    assert_keeps(keep, reference.keep_largest(scores.numpy(), count))


@pytest.mark.parametrize("size", [15, 16, 17, 18])  # pairwise comparison up to 16, a selection above
@pytest.mark.parametrize("levels", [1, 3, 10_000])
@pytest.mark.parametrize("groups", [20, 1025])  # up to 1024, a sort instead of the comparison
def test_keep_largest_on_both_sides_of_the_small_group(groups, size, levels):
    scores = torch.randint(0, levels, (groups, size), generator=torch.Generator().manual_seed(size)).float()
    for count in range(size + 1):
        expected = reference.keep_largest(scores.numpy(), count)
        for view in [scores, *non_contiguous_views(scores)]:
            assert_keeps(keep_largest(view, count), expected)


@pytest.mark.parametrize(("groups", "size"), [(5, 8), (5, 24), (2000, 8), (2, 66_000)])
def test_keep_largest_of_rows_that_share_memory(groups, size):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0)).expand(groups, size)
    assert_keeps(keep_largest(scores, 3), reference.keep_largest(scores.numpy(), 3))


def test_keep_largest_of_more_groups_than_are_compared_at_once():
    scores = torch.randint(0, 4, (70_000, 4), generator=torch.Generator().manual_seed(0)).float()
    assert_keeps(keep_largest(scores, 2), reference.keep_largest(scores.numpy(), 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("groups", "size"), [(10, 8), (10, 24), (2000, 8)])
def test_keep_largest_of_any_float_type(dtype, groups, size):
    scores = torch.rand(groups, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_keeps(keep_largest(scores, 5), reference.keep_largest(reference.array(scores), 5))


def _large_groups() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = 66_000  # from 65536 on, a sample tells where the threshold is
    sampled = torch.arange(size) % 61 == 0
    others = (~sampled).nonzero()[:, 0]
    return {
        "random": torch.rand(size, generator=generator),
        "few levels": torch.randint(0, 4, (size,), generator=generator).float(),
        "all alike": torch.ones(size),
        "all but the sample larger": torch.rand(size, generator=generator) + (~sampled).float(),
        "all but the sample smaller": torch.rand(size, generator=generator) + sampled.float(),
        "one dtype wider": torch.rand(size, generator=generator, dtype=torch.float64),
        "ascending": torch.arange(size).float(),
        "infinite": torch.rand(size, generator=generator).masked_fill_(~sampled, torch.inf),
        "two levels": torch.ones(size).index_fill_(0, torch.cat([sampled.nonzero()[:, 0], others])[:33_000], 0.0),
        "less than the sample": (1.0 + torch.rand(size, generator=generator))
        .index_fill_(0, torch.tensor(610), 1.0)
        .index_fill_(0, others[:2000], 0.0),
    }


@pytest.mark.parametrize("count", [1, 2, 600, 26_400, 33_000, 64_000, 65_500, 65_999])
@pytest.mark.parametrize("scores", [pytest.param(scores, id=name) for name, scores in _large_groups().items()])
def test_keep_largest_of_a_large_group(scores, count):
    both = torch.stack([scores, scores.flip(0)])
    assert_keeps(keep_largest(both, count), reference.keep_largest(both.numpy(), count))


def test_keep_largest_with_infinite_scores():
    scores = torch.tensor([[float("inf"), 1.0, float("inf"), 0.0]])
    assert keep_largest(scores, 1).tolist() == [[False, False, True, False]]


# ---- unstructured


@given(score_matrices(), sparsities)
@example(torch.ones(2, 10), 0.7)
@example(torch.ones(2, 100), 0.29)  # 100 * 0.29 is 28.999999999999996
def test_unstructured_prunes_exactly_so_many_of_each_group(scores, sparsity):
    by_row = Unstructured()(scores, sparsity)
    assert ((~by_row).sum(dim=1) == int(scores.shape[1] * sparsity)).all()
    assert_keeps(by_row, reference.keep_by_row(scores.numpy(), sparsity))
    by_layer = Unstructured(group="layer")(scores, sparsity)
    assert (~by_layer).sum() == int(scores.numel() * sparsity)
    assert_keeps(by_layer, reference.keep_by_layer(scores.numpy(), sparsity))


@pytest.mark.parametrize("scores", [torch.zeros(3, 20), torch.ones(3, 20), torch.zeros(3, 12)])
def test_ties_take_the_lower_columns_first(scores):
    d_in = scores.shape[1]
    by_row = Unstructured()(scores, 0.25)
    assert by_row.tolist() == [[column >= d_in // 4 for column in range(d_in)]] * 3
    by_layer = Unstructured(group="layer")(scores, 0.25)
    assert by_layer.flatten().tolist() == [index >= scores.numel() // 4 for index in range(scores.numel())]
    two_of_four = NM(2, 4)(scores, 0.5)
    assert two_of_four.tolist() == [[False, False, True, True] * (d_in // 4)] * 3


# ---- N:M


@pytest.mark.parametrize(("n", "m"), N_OF_M)
@given(data=st.data())
@settings(max_examples=20)
def test_n_of_every_m_survive(n, m, data):
    scores = data.draw(score_matrices(multiple_of=m, multiples=4))
    keep = NM(n, m)(scores, 1 - n / m)
    assert (keep.reshape(-1, m).sum(dim=1) == n).all()
    assert_keeps(keep, reference.keep_n_of_m(scores.numpy(), n, m))


# ---- the share of each row


@pytest.mark.parametrize("shape", [(8, 16), (5, 37), (24, 64)])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_equal_share_is_the_bisection(shape, sparsity):
    # float64 and integers: the running sums are exact, so no rounding decides where a row is cut
    scores = distinct_scores(0, *shape, dtype=torch.float64)
    assert_keeps(EqualShare()(scores, sparsity), reference.keep_equal_share(scores.numpy(), sparsity))


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
@settings(max_examples=20)
def test_equal_share_comes_within_a_thousandth_or_to_the_bracket_end(seed, sparsity):
    scores = distinct_scores(seed, 8, 16, dtype=torch.float64)
    reached = 1 - EqualShare()(scores, sparsity).double().mean().item()
    if abs(reached - sparsity) > 0.001:
        # ten halvings of [0, 0.8] are the first to give a bracket below 0.001
        ends = [1 - reference.keep_above_share(scores.numpy(), 0.8 * k / 1024).mean() for k in range(1025)]
        last_below = max(k for k in range(1024) if k == 0 or ends[k] <= sparsity)
        assert ends[last_below] <= reached <= ends[last_below + 1]


def test_equal_share_gives_rows_their_own_sparsity():
    flat, steep = torch.ones(100) + torch.arange(100) / 1000, torch.arange(100).float() ** 4 + 1
    pruned_flat, pruned_steep = (~EqualShare()(torch.stack([flat, steep]), 0.5)).sum(dim=1).tolist()
    assert pruned_flat < 40
    assert pruned_steep > 60


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_equal_share_leaves_a_matrix_that_is_already_there(sparsity):
    scores = torch.rand(4, 4096, generator=torch.Generator().manual_seed(0))  # a thousandth is 4 weights of a row
    keep = EqualShare()(scores, sparsity)
    assert torch.equal(EqualShare()(scores * keep, sparsity), keep)


# ---- laws of every pattern


@pytest.mark.parametrize("pattern", [p for p in PATTERNS.values() if not isinstance(p, NM)], ids=repr)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_sparsity_zero_keeps_everything(pattern, seed):
    assert pattern(distinct_scores(seed, 4, 24), 0.0).all()


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), NM(1, 4), NM(5, 32)], ids=repr)
def test_layout_in_memory_does_not_matter(pattern):
    scores = distinct_scores(0, 6, 32)
    sparsity = getattr(pattern, "sparsity", 0.5)
    expected = reference.keep(pattern, reference.array(scores), sparsity)
    for view in non_contiguous_views(scores):
        assert_keeps(pattern(view, sparsity), expected)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS.values() if not isinstance(p, NM)], ids=repr)
@given(seed=st.integers(0, 2**32 - 1), d_in=st.sampled_from([12, 30]))
@settings(max_examples=20)
def test_permuted_columns_permute_what_is_kept(pattern, seed, d_in):
    scores = distinct_scores(seed, 5, d_in, dtype=torch.float64)
    order = torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pattern(scores[:, order], 0.5), pattern(scores, 0.5)[:, order])


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=repr)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_permuted_rows_permute_what_is_kept(pattern, seed):
    scores = distinct_scores(seed, 6, 24, dtype=torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pattern(scores[order], 0.5), pattern(scores, 0.5)[order])


@pytest.mark.parametrize("mode", [(False, False), (True, False), (True, True)], ids=["off", "strict", "warn_only"])
@pytest.mark.parametrize("pattern", [*PATTERNS.values(), NM(5, 32)], ids=repr)
def test_deterministic_mode_is_lifted_for_values_only_and_as_before(pattern, mode, monkeypatch):
    """What it refuses on CUDA, kthvalue and cumsum of floats, runs without it; on a CPU it refuses nothing."""

    def strict():
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def watched(original):
        def watching(scores, *args, **kwargs):
            assert not (scores.is_floating_point() and strict()[0])
            return original(scores, *args, **kwargs)

        return watching

    for name in ("kthvalue", "cumsum"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    before = strict()
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
    try:
        pattern(distinct_scores(0, 4, 32).half(), 0.5)
        assert strict() == mode
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ---- names and errors


@pytest.mark.parametrize(("n", "m"), N_OF_M)
def test_any_n_of_m_has_a_name(n, m):
    assert pattern_named(f"{n}:{m}") == NM(n, m)
    assert NM(n, m).sparsity == pytest.approx(1 - n / m)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_name_gives_its_pattern(name):
    assert pattern_named(name) is PATTERNS[name]


@pytest.mark.parametrize("name", ["2-4", "2:4:8", "", "rows", "-1:4", " 2:4"])
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"no pattern is called {re.escape(repr(name))}: use one of .*2:4.* any N:M"):
        pattern_named(name)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (0, 4), (5, 4), (-1, 4), (0, 0)])
def test_impossible_n_of_m_is_refused(n, m):
    with pytest.raises(ValueError, match=rf"whole numbers with 1 <= N < M, but it is {n}:{m}\."):
        NM(n, m)


@pytest.mark.parametrize("name", ["4:4", "0:4"])
def test_impossible_n_of_m_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"1 <= N < M, but it is {name}"):
        pattern_named(name)


def test_unknown_group_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # beartype refuses it before we do
    with pytest.raises(ValueError, match=r"group of Unstructured must be one of row, layer, but it is 'column'\."):
        Unstructured(group="column")


@pytest.mark.parametrize(("n", "m"), [(1.5, 4), (2, 4.0), ("2", 4), (2, None), (True, 4), (float("nan"), 4)])
def test_n_and_m_that_are_no_integers_are_refused(monkeypatch, n, m):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=re.escape(f"whole numbers with 1 <= N < M, but it is {n!r}:{m!r}.")):
        NM(n, m)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.49, 0.51, 0.75])
def test_n_of_m_has_one_sparsity(sparsity):
    with pytest.raises(
        ValueError, match=rf"sparsity must be 0\.5 for the pattern 2:4, but it is {sparsity:g}\. Give sparsity=0\.5, or"
    ):
        NM(2, 4).check(sparsity)


@pytest.mark.parametrize(("n", "m"), N_OF_M)
def test_n_of_m_fits_the_widths_that_m_divides(n, m):
    fitting = [d_in for d_in in range(1, 100) if NM(n, m).why_not(d_in) is None]
    assert fitting == list(range(m, 100, m))
    assert NM(n, m).why_not(m + 1) == f"input width {m + 1} is not a multiple of {m}"


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS.values() if not isinstance(pattern, NM)], ids=repr)
def test_other_patterns_fit_every_width(pattern):
    assert not any(pattern.why_not(d_in) for d_in in range(1, 100))


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), *(NM(n, m) for n, m in [*N_OF_M, (1, 3)])], ids=repr)
def test_check_accepts_what_fits(pattern):
    pattern.check(getattr(pattern, "sparsity", 0.37))


def test_check_accepts_a_rounded_sparsity():
    NM(1, 3).check(0.666667)
