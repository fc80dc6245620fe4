"""Input statistics are sums: any split of the tokens gives the same, in a type wide enough."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support.layers import random_layer, solve
from support.pairwise import pairwise

from wanda_lightning.core.solvers import SparseGPT
from wanda_lightning.core.statistics import (
    SUMS,
    InputStatistics,
    cholesky,
    dampen_,
    inverse_factor,
    relative_error,
    scaled,
    sum_squares,
)

seeds = st.integers(0, 2**32 - 1)


def tokens_of(seed, count=24, d_in=6, dtype=torch.float32):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integer_tokens(seed, count, d_in=6):
    """Their squares add up without rounding, so the order of a sum cannot matter."""
    return torch.randint(
        -20, 21, (count, d_in), generator=torch.Generator().manual_seed(seed)
    ).float()


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


@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 2**19), (2**18 + 1, 3), (70_000, 11), (5, 7, 100, 200), (3, 2**18)]
)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_squares_are_summed_over_the_first_dimension_in_any_layout(shape, dtype):
    """Integers below 8: their squares add up without rounding."""
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0))
    expected = (x.numpy() ** 2).sum(axis=0)
    for layout in (
        x,
        x.movedim(1, -1).contiguous().movedim(-1, 1),
        x.repeat_interleave(2, dim=0)[::2],
    ):
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
    pairwise(
        [None, "highest", "high", "medium"],
        [None, "ieee", "tf32"],
        [None, "ieee", "bf16"],
        [None, "tf32"],
    ),
)
def test_gram_matrices_have_full_precision_whatever_the_user_has_set(
    legacy, cuda, mkldnn, every, monkeypatch
):
    """PyTorch has an old and a new way to set the precision of matrix products, and refuses to read some mixtures."""
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    def settings():
        try:
            old = torch.get_float32_matmul_precision()
        except RuntimeError as error:
            old = str(error)
        return old, [backend.fp32_precision for backend in backends]

    seen = []
    original = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *args, **kwargs: seen.append(settings()) or original(*args, **kwargs)
    )
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


@given(seeds, st.integers(0, 30))
def test_two_halves_accumulate_to_the_whole(seed, cut):
    tokens = integer_tokens(seed, 30)
    first = tokens[:cut]
    second = tokens[cut:]
    whole = statistics(tokens)
    assert_same(statistics(first, second), whole)
    merged = statistics(first)
    other = statistics(second)
    merged.merge(other)
    assert_same(merged, whole)
    assert_same(other, statistics(second))


def test_update_leaves_the_tokens_as_they_were_and_keeps_no_graph():
    tokens = tokens_of(7).requires_grad_()
    before = tokens.detach().clone()
    inputs = statistics(tokens)
    assert torch.equal(tokens, before)
    assert not any(value.requires_grad for value in inputs.sums.values())
    with pytest.raises(
        ValueError, match=r"needs must be names from .*square_sum.*, but they hold \['cube_sum'\]"
    ):
        InputStatistics({"square_sum", "cube_sum"})


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


def gram_of(tokens):
    return tokens.t() @ tokens


def test_factors_are_those_of_numpy():
    _, tokens = random_layer(torch.float64)
    gram = gram_of(tokens)
    matrix = gram.numpy() + 0.1 * np.mean(np.diag(gram.numpy())) * np.eye(64)
    np.testing.assert_allclose(dampen_(gram.clone(), 0.1).numpy(), matrix)
    lower, used = cholesky(gram, 0.1)
    assert used == 0.1
    np.testing.assert_allclose(lower.numpy(), np.linalg.cholesky(matrix))
    upper = inverse_factor(gram, 0.1).numpy()
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(matrix), rtol=1e-9, atol=1e-12)
    scale, correlations = scaled(gram, 0.1)
    np.testing.assert_allclose(np.outer(scale, scale) * correlations.numpy(), matrix)
    np.testing.assert_allclose(correlations.diagonal(), 1)
    # Without active inputs all weigh the same.
    assert torch.equal(dampen_(torch.zeros(3, 3), 0.5), torch.eye(3))


def test_an_indefinite_matrix_is_dampened_until_it_is_definite():
    gram = torch.diag(torch.tensor([5.0, 5.0, -1.0]))
    lower, used = cholesky(gram, 0.01)
    assert used == 1
    torch.testing.assert_close(lower @ lower.t(), dampen_(gram.clone(), 1.0))


def test_too_few_tokens_are_dampened(caplog):
    weight, tokens = random_layer(tokens=3)
    with caplog.at_level(logging.WARNING):
        pruned, _ = solve(SparseGPT(dampening=1e-9), weight, tokens)
    assert "no Cholesky factor with dampening 1e-09, so" in caplog.text
    assert pruned.isfinite().all()
    tokens[0, 0] = float("nan")
    with pytest.raises(ValueError, match="no Cholesky factor, not even with dampening"):
        solve(SparseGPT(), weight, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_relative_error_is_that_of_the_outputs(dtype):
    weight, tokens = random_layer(torch.float64)
    weight = weight.to(dtype)
    pruned, _ = solve(SparseGPT(), weight.float(), tokens.float())
    pruned = pruned.to(dtype)
    outputs = weight.double() @ tokens.t()
    lost = outputs - pruned.double() @ tokens.t()
    expected = float(lost.square().sum() / outputs.square().sum())
    assert relative_error(weight, pruned, gram_of(tokens.float())) == pytest.approx(
        expected, rel=1e-4
    )
    assert relative_error(weight, weight, gram_of(tokens)) == 0
    assert relative_error(weight, torch.zeros_like(weight), gram_of(tokens)) == 1
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0


def test_the_relative_error_of_a_tall_layer_is_that_of_evenly_spaced_rows():
    weight, tokens = random_layer(torch.float64, shape=(600, 8))
    pruned = torch.where(weight.abs() > 0.5, weight, 0)
    expected = relative_error(weight[::3], pruned[::3], gram_of(tokens))
    assert relative_error(weight, pruned, gram_of(tokens)) == pytest.approx(expected)


def test_the_relative_error_needs_no_autocast_and_is_unknown_if_it_overflows():
    weight, tokens = random_layer(torch.float32)
    pruned = torch.where(weight.abs() > 0.5, weight, 0)
    gram = gram_of(tokens)
    expected = relative_error(weight, pruned, gram)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(weight, pruned, gram) == expected
    assert relative_error(weight, pruned, gram * 1e38) is None
