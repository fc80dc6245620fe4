"""Patterns keep exactly what a stable sort of each group would keep."""

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from support import reference
from support.reference import assert_keeps

from wanda_lightning.core.patterns import NM, EqualShare, Unstructured
from wanda_lightning.core.permutation import Assignment
from wanda_lightning.methods import PATTERNS as PATTERN_CHOICES

PATTERNS = {name: make() for name, make in PATTERN_CHOICES.items()}

N_OF_M = [(2, 4), (4, 8), (1, 4), (1, 3), (2, 8), (1, 2), (5, 32)]
sparsities = st.floats(0, 1, exclude_max=True)


@st.composite
def score_matrices(draw, multiple_of=1, multiples=40):
    """Scores of few or many levels: 1 makes all equal, 3 makes many ties, 10000 almost none."""
    rows = draw(st.integers(1, 6))
    d_in = multiple_of * draw(st.integers(1, multiples))
    levels = draw(st.sampled_from([1, 3, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(0, levels, (rows, d_in), generator=generator).float()


def distinct_scores(seed, rows, d_in, dtype=torch.float32):
    """The numbers 1 ... rows * d_in in random order."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + torch.randperm(rows * d_in, generator=generator)).to(dtype).reshape(rows, d_in)


@given(score_matrices(), sparsities)
@example(torch.ones(2, 10), 0.7)
@example(torch.ones(2, 100), 0.29)  # 100 * 0.29 is 28.999999999999996
def test_unstructured_prunes_the_exact_number_of_each_group(scores, sparsity):
    assert_keeps(Unstructured()(scores, sparsity), reference.keep_by_row(scores.numpy(), sparsity))
    assert_keeps(
        Unstructured(group="layer")(scores, sparsity),
        reference.keep_by_layer(scores.numpy(), sparsity),
    )


@pytest.mark.parametrize(("n", "m"), N_OF_M)
@given(data=st.data())
@settings(max_examples=20)
def test_n_of_every_m_survive(n, m, data):
    scores = data.draw(score_matrices(multiple_of=m, multiples=4))
    assert_keeps(NM(n, m)(scores, 1 - n / m), reference.keep_n_of_m(scores.numpy(), n, m))


@pytest.mark.parametrize("shape", [(8, 16), (5, 37), (24, 64)])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_equal_share_is_the_bisection(shape, sparsity):
    # float64 and integers: the running sums are exact, so no rounding decides where a row is cut
    scores = distinct_scores(0, *shape, dtype=torch.float64)
    assert_keeps(
        EqualShare()(scores, sparsity), reference.keep_equal_share(scores.numpy(), sparsity)
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_equal_share_leaves_a_pruned_matrix_as_it_is(sparsity):
    # A thousandth is 4 weights of a row.
    scores = torch.rand(4, 4096, generator=torch.Generator().manual_seed(0))
    keep = EqualShare()(scores, sparsity)
    assert torch.equal(EqualShare()(scores * keep, sparsity), keep)


@pytest.mark.parametrize(
    "mode", [(False, False), (True, False), (True, True)], ids=["off", "strict", "warn_only"]
)
@pytest.mark.parametrize("choose", [*PATTERNS.values(), NM(5, 32), Assignment(1)], ids=repr)
def test_the_users_deterministic_mode_stays(choose, mode):
    """tests/device shows where it is off."""
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
    try:
        choose(
            distinct_scores(0, 4, 32).half(), NM(2, 4) if isinstance(choose, Assignment) else 0.5
        )
        after = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        assert after == mode
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), *(NM(n, m) for n, m in N_OF_M)], ids=repr)
def test_which_sparsities_and_widths_fit(pattern):
    pattern.check(getattr(pattern, "sparsity", 0.37))
    fitting = [d_in for d_in in range(1, 100) if pattern.why_not(d_in) is None]
    if not isinstance(pattern, NM):
        assert fitting == list(range(1, 100))
        return
    assert fitting == list(range(pattern.m, 100, pattern.m))
    assert (
        pattern.why_not(pattern.m + 1)
        == f"input width {pattern.m + 1} is not a multiple of {pattern.m}"
    )
    pattern.check(round(pattern.sparsity, 6))
    for sparsity in (0.0, pattern.sparsity - 0.01, pattern.sparsity + 0.01):
        with pytest.raises(
            ValueError, match=f"sparsity must be {pattern.sparsity:g} .*, but it is {sparsity:g}"
        ):
            pattern.check(sparsity)
