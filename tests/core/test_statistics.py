"""Input statistics are sums: any split of the tokens gives the same, in a type wide enough."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose
from support.layers import DTYPES, assert_same, random_layer, rng, solve
from support.pairwise import pairwise
from support.refusals import refuses
from torch.testing import assert_close

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


def random_tokens():
    return torch.randn(24, 6, generator=rng())


def integer_tokens(seed, count):
    """Their squares add up without rounding, so the order of a sum cannot matter."""
    generator = rng(seed)
    return torch.randint(-20, 21, (count, 6), generator=generator).float()


def statistics(*batches):
    inputs = InputStatistics(SUMS)
    for batch in batches:
        inputs.update(batch)
    return inputs


def assert_same_statistics(some, other):
    assert some.count == other.count
    assert_same(some.sums, other.sums)


@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 2**19), (2**18 + 1, 3), (70_000, 11), (5, 7, 100, 200), (3, 2**18)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_are_summed_over_the_first_dimension_in_any_layout(shape, dtype):
    """Integers below 8: their squares add up without rounding."""
    integers = torch.randint(-7, 8, shape, generator=rng())
    expected = (integers.numpy() ** 2).sum(axis=0)
    channels_last = integers.movedim(1, -1).contiguous().movedim(-1, 1)
    strided = integers.repeat_interleave(2, dim=0)[::2]
    for layout in (integers, channels_last, strided):
        total = sum_squares(layout.to(dtype))
        assert total.dtype == torch.promote_types(dtype, torch.float32)
        assert np.array_equal(total.numpy(), expected)


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1100])  # made of halves from 512 on
def test_a_wide_gram_matrix_is_that_of_one_product(width):
    tokens = torch.randn(30, width, dtype=torch.float64, generator=rng())
    gram = statistics(tokens).sums["gram"]
    assert_allclose(gram.numpy(), tokens.numpy().T @ tokens.numpy(), rtol=0, atol=1e-12)


BACKENDS = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def precisions():
    """The precision of matrix products in the old way, or why it cannot be read, and in the new way."""
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        old = str(error)
    return old, [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def _default_precisions():
    before = precisions()
    assert before == ("highest", ["none"] * 3)
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"
    assert precisions() == before


@pytest.mark.usefixtures("_default_precisions")
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
    seen = []
    original = torch.mm

    def multiply(*args, **kwargs):
        seen.append(precisions())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", multiply)
    if legacy:
        torch.set_float32_matmul_precision(legacy)
    for backend, precision in zip(BACKENDS, (every, cuda, mkldnn), strict=True):
        if precision:
            backend.fp32_precision = precision
    by_user = precisions()
    statistics(random_tokens())
    assert precisions() == by_user
    ((old, (_, *matmul)),) = seen
    assert old == "highest"
    assert matmul == ["ieee", "ieee"]


@given(seeds, st.integers(0, 30))
def test_two_halves_accumulate_to_the_whole(seed, cut):
    tokens = integer_tokens(seed, 30)
    first = tokens[:cut]
    second = tokens[cut:]
    whole = statistics(tokens)
    assert_same_statistics(statistics(first, second), whole)

    merged = statistics(first)
    other = statistics(second)
    merged.merge(other)
    assert_same_statistics(merged, whole)
    assert_same_statistics(other, statistics(second))


def test_update_leaves_the_tokens_as_they_were_and_keeps_no_graph():
    tokens = random_tokens().requires_grad_()
    inputs = statistics(tokens)
    assert torch.equal(tokens, random_tokens())
    assert not any(value.requires_grad for value in inputs.sums.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("needs", [[*SUMS], *([name] for name in SUMS)], ids=str)
def test_finite_notices_one_bad_number(needs, bad):
    tokens = random_tokens()
    good_inputs = InputStatistics(needs)
    good_inputs.update(tokens)
    assert good_inputs.finite()
    tokens[11, 3] = bad
    bad_inputs = InputStatistics(needs)
    bad_inputs.update(tokens)
    assert not bad_inputs.finite()


def gram_of(tokens):
    return tokens.t() @ tokens


@pytest.fixture
def gram():
    _, tokens = random_layer(torch.float64)
    return gram_of(tokens)


@pytest.fixture
def dampened(gram):
    """The Gram matrix with a dampening of 0.1, by NumPy."""
    matrix = gram.numpy()
    return matrix + 0.1 * np.mean(np.diag(matrix)) * np.eye(64)


def test_the_diagonal_is_dampened_by_a_fraction_of_its_mean(gram, dampened):
    assert_allclose(dampen_(gram, 0.1).numpy(), dampened)


def test_without_active_inputs_all_are_dampened_the_same():
    assert torch.equal(dampen_(torch.zeros(3, 3), 0.5), torch.eye(3))


def test_the_cholesky_factor_is_that_of_numpy(gram, dampened):
    lower, used = cholesky(gram, 0.1)
    assert used == 0.1
    assert_allclose(lower.numpy(), np.linalg.cholesky(dampened))


def test_the_inverse_factor_is_upper_triangular_and_one_of_the_inverse(gram, dampened):
    upper = inverse_factor(gram, 0.1).numpy()
    assert not np.tril(upper, -1).any()
    assert_allclose(upper.T @ upper, np.linalg.inv(dampened), rtol=1e-9, atol=1e-12)


def test_a_scaled_matrix_has_a_diagonal_of_1(gram, dampened):
    scale, correlations = scaled(gram, 0.1)
    assert_allclose(np.outer(scale, scale) * correlations.numpy(), dampened)
    assert_allclose(correlations.diagonal(), 1)


def test_an_indefinite_matrix_is_dampened_until_it_is_definite():
    gram = torch.diag(torch.tensor([5.0, 5.0, -1.0]))
    lower, used = cholesky(gram, 0.01)
    assert used == 1
    assert_close(lower @ lower.t(), dampen_(gram.clone(), 1.0))


def test_too_few_tokens_are_dampened(caplog):
    weight, tokens = random_layer(tokens=3)
    with caplog.at_level(logging.WARNING):
        pruned, _ = solve(SparseGPT(dampening=1e-9), weight, tokens)
    assert "no Cholesky factor with dampening 1e-09, so" in caplog.text
    assert pruned.isfinite().all()


def test_a_matrix_that_stays_indefinite_is_refused():
    weight, tokens = random_layer()
    tokens[0, 0] = float("nan")
    with refuses("no Cholesky factor, not even with dampening"):
        solve(SparseGPT(), weight, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_relative_error_is_that_of_the_outputs(dtype):
    weight, tokens = random_layer()
    pruned, _ = solve(SparseGPT(), weight, tokens)
    weight = weight.to(dtype)
    pruned = pruned.to(dtype)
    outputs = weight.double() @ tokens.double().t()
    lost = outputs - pruned.double() @ tokens.double().t()
    expected = float(lost.square().sum() / outputs.square().sum())
    gram = gram_of(tokens)
    assert relative_error(weight, pruned, gram) == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # does not round it
        assert relative_error(weight, pruned, gram) == pytest.approx(expected, rel=1e-4)


def test_the_relative_error_is_0_if_nothing_is_lost_and_1_if_everything_is():
    weight, tokens = random_layer()
    zeros = torch.zeros_like(weight)
    gram = gram_of(tokens)
    assert relative_error(weight, weight, gram) == 0
    assert relative_error(weight, zeros, gram) == 1
    assert relative_error(zeros, zeros, gram) == 0
    assert relative_error(weight, zeros, gram * 1e38) is None  # it overflows


def test_the_relative_error_of_a_tall_layer_is_that_of_evenly_spaced_rows():
    weight, tokens = random_layer(torch.float64, shape=(600, 8))
    pruned = torch.where(weight.abs() > 0.5, weight, 0)
    gram = gram_of(tokens)
    expected = relative_error(weight[::3], pruned[::3], gram)
    assert relative_error(weight, pruned, gram) == pytest.approx(expected)
