"""Patterns keep exactly what a stable sort of each group would keep."""

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from support import reference
from support.layers import rng
from support.reference import assert_keeps
from support.refusals import refuses

from wanda_lightning.core.patterns import NM, EqualShare, Unstructured
from wanda_lightning.methods import PATTERNS as PATTERN_CHOICES

PATTERNS = [make() for make in PATTERN_CHOICES.values()]

N_OF_M = [(2, 4), (4, 8), (1, 4), (1, 3), (2, 8), (1, 2), (5, 32)]
sparsities = st.floats(0, 1, exclude_max=True)


@st.composite
def score_matrices(draw, multiple_of=1, multiples=40):
    """Scores of few or many levels: 1 makes all equal, 3 makes many ties, 10000 almost none."""
    rows = draw(st.integers(1, 6))
    d_in = multiple_of * draw(st.integers(1, multiples))
    levels = draw(st.sampled_from([1, 3, 10_000]))
    generator = rng(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(0, levels, (rows, d_in), generator=generator).float()


def distinct_scores(rows, d_in):
    """The numbers 1 ... rows * d_in in random order."""
    order = torch.randperm(rows * d_in, generator=rng())
    return (1 + order).reshape(rows, d_in)


@given(score_matrices(), sparsities)
@example(torch.ones(2, 10), 0.7)
@example(torch.ones(2, 100), 0.29)  # 100 * 0.29 is 28.999999999999996
def test_unstructured_prunes_the_exact_number_of_each_group(scores, sparsity):
    by_row = Unstructured()(scores, sparsity)
    assert_keeps(by_row, reference.keep_by_row(scores.numpy(), sparsity))
    by_layer = Unstructured(group="layer")(scores, sparsity)
    assert_keeps(by_layer, reference.keep_by_layer(scores.numpy(), sparsity))


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
    scores = distinct_scores(*shape).double()
    assert_keeps(
        EqualShare()(scores, sparsity), reference.keep_equal_share(scores.numpy(), sparsity)
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_equal_share_leaves_a_pruned_matrix_as_it_is(sparsity):
    # A thousandth is 4 weights of a row.
    scores = torch.rand(4, 4096, generator=rng())
    keep = EqualShare()(scores, sparsity)
    assert torch.equal(EqualShare()(scores * keep, sparsity), keep)


@pytest.fixture(
    params=[(False, False), (True, False), (True, True)], ids=["off", "strict", "warn_only"]
)
def deterministic_mode(request):
    """Whether the user allows only deterministic kernels, and whether others give a warning only."""
    enabled, warn_only = request.param
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", [*PATTERNS, NM(5, 32)], ids=repr)
def test_the_users_deterministic_mode_stays(pattern, deterministic_mode):
    """tests/device shows where it is off."""
    pattern(distinct_scores(4, 32).half(), 0.5)
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    assert (enabled, warn_only) == deterministic_mode


@pytest.mark.parametrize(
    "pattern", [each for each in PATTERNS if not isinstance(each, NM)], ids=repr
)
def test_patterns_without_groups_take_any_sparsity_and_width(pattern):
    pattern.check(0.37)
    assert not any(map(pattern.why_not, range(1, 100)))


@pytest.mark.parametrize(("n", "m"), N_OF_M)
def test_n_of_m_takes_widths_of_whole_groups_and_its_own_sparsity_only(n, m):
    pattern = NM(n, m)
    assert [d_in for d_in in range(1, 100) if pattern.why_not(d_in) is None] == list(
        range(m, 100, m)
    )
    assert pattern.why_not(m + 1) == f"input width {m + 1} is not a multiple of {m}"

    own = 1 - n / m
    pattern.check(own)
    pattern.check(round(own, 6))
    for sparsity in (0.0, own - 0.01, own + 0.01):
        with refuses(f"sparsity must be {own:g} .*, but it is {sparsity:g}"):
            pattern.check(sparsity)
