"""Input statistics are sums: any split of the tokens gives the same, in a type wide enough."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.pairwise import pairwise

from wanda_lightning.core.statistics import SUMS, InputStatistics, sum_squares

seeds = st.integers(0, 2**32 - 1)


def tokens_of(seed, count=24, d_in=6, dtype=torch.float32):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integer_tokens(seed, count, d_in=6):
    """Their squares add up without rounding, so the order of a sum cannot matter."""
    return torch.randint(-20, 21, (count, d_in), generator=torch.Generator().manual_seed(seed)).float()


def statistics(*batches):
    inputs = InputStatistics(SUMS)
    for batch in batches:
        inputs.update(batch)
    return inputs


def assert_same(some, other):
    assert some.count == other.count
    assert some.sums.keys() == other.sums.keys()
    for name in some.sums:
        torch.testing.assert_close(some.sums[name], other.sums[name], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (1, 2**19), (2**18 + 1, 3), (70_000, 11), (5, 7, 100, 200), (3, 2**18)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_squares_are_summed_over_the_first_dimension_in_any_layout(shape, dtype):
    """Integers below 8: their squares add up without rounding."""
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0))
    expected = (x.numpy() ** 2).sum(axis=0)
    for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.repeat_interleave(2, dim=0)[::2]):
        total = sum_squares(layout.to(dtype))
        assert total.dtype == torch.promote_types(dtype, torch.float32)
        assert np.array_equal(total.numpy(), expected)


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1100])  # made of halves from 512 on
def test_a_wide_gram_matrix_is_that_of_one_product(width):
    tokens = torch.randn(30, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = statistics(tokens).sums["gram"]
    np.testing.assert_allclose(gram.numpy(), tokens.numpy().T @ tokens.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("legacy", "cuda", "mkldnn", "every"),
    pairwise([None, "highest", "high", "medium"], [None, "ieee", "tf32"], [None, "ieee", "bf16"], [None, "tf32"]),
)
def test_gram_matrices_have_full_precision_whatever_the_user_has_set(legacy, cuda, mkldnn, every, monkeypatch):
    """PyTorch has an old and a new way to set the precision of matrix products, and refuses to read some mixtures."""
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    def settings():
        try:
            old = torch.get_float32_matmul_precision()
        except RuntimeError as error:
            old = str(error)
        return old, [backend.fp32_precision for backend in backends]

    seen, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: seen.append(settings()) or original(*args, **kwargs))
    before = settings()
    assert before == ("highest", ["none"] * 3)
    try:
        if legacy:
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, (every, cuda, mkldnn), strict=True):
            if precision:
                backend.fp32_precision = precision
        by_user = settings()
        statistics(tokens_of(0))
        assert settings() == by_user
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "none"
    assert settings() == before
    assert [(old, precisions[1:]) for old, precisions in seen] == [("highest", ["ieee", "ieee"])]


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 300), (torch.float16, 2100)], ids=str)
def test_half_precision_is_accumulated_in_float32(dtype, count):
    tokens = (1000 + 100 * tokens_of(4)).to(dtype)  # squares of about 1e6; fp16 ends at 65504
    total = statistics(tokens).sums["square_sum"]
    assert total.dtype == torch.float32
    np.testing.assert_allclose(reference.array(total), reference.square_sum(reference.array(tokens)), rtol=1e-6)
    tokens = torch.ones(count, 2, dtype=dtype)  # a running sum in bf16 would stop at 256, in fp16 at 2048
    batches = tokens[: count - 50], *tokens[count - 50 :].split(1)
    assert statistics(*batches).sums["square_sum"].tolist() == [count, count]


@given(seeds, st.integers(0, 30))
def test_two_halves_accumulate_to_the_whole(seed, cut):
    tokens = integer_tokens(seed, 30)
    first, second = tokens[:cut], tokens[cut:]
    whole = statistics(tokens)
    assert_same(statistics(first, second), whole)
    merged = statistics(first)
    merged.merge(statistics(second))
    assert_same(merged, whole)


def test_merge_leaves_the_other_as_it_was():
    other, empty = statistics(tokens_of(5)), statistics()
    empty.merge(other)
    empty.update(tokens_of(6))
    assert_same(other, statistics(tokens_of(5)))


def test_update_leaves_the_tokens_as_they_were_and_keeps_no_graph():
    tokens = tokens_of(7).requires_grad_()
    before = tokens.detach().clone()
    inputs = statistics(tokens)
    assert torch.equal(tokens, before)
    assert not any(value.requires_grad for value in inputs.sums.values())


def test_only_what_is_needed_is_kept():
    inputs = InputStatistics()
    inputs.update(tokens_of(8))
    assert inputs.sums == {}
    assert inputs.count == 24
    assert inputs.finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_notices_one_bad_number(bad):
    tokens = tokens_of(9)
    assert statistics(tokens).finite()
    tokens[11, 3] = bad
    assert not statistics(tokens).finite()
    for name in SUMS:
        inputs = InputStatistics({name})
        inputs.update(tokens)
        assert not inputs.finite()


def test_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match=r"needs must be names from .*square_sum.*, but they hold \['cube_sum'\]"):
        InputStatistics({"square_sum", "cube_sum"})
