"""Relaxed masks equal slow loops, approach the exact masks, and pass gradients to the scores."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.reference import array

from wanda_lightning.core.relaxation import Gates, PatternChoice

ZERO = torch.tensor(0.0)


def scores(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relaxed_patterns(matrix, n, m, temperature):
    """The mean of all patterns of each group, weighted by the exponentials of their total scores."""
    rows, columns = matrix.shape
    result = np.zeros((rows, columns))
    for row, start in itertools.product(range(rows), range(0, columns, m)):
        group = matrix[row, start : start + m]
        weights = {
            kept: math.exp(sum(group[i] for i in kept) / temperature) for kept in itertools.combinations(range(m), n)
        }
        for kept, weight in weights.items():
            for i in kept:
                result[row, start + i] += weight / sum(weights.values())
    return result


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_patterns_equal_a_loop(n, m, temperature):
    x = scores(3, 16)
    found = PatternChoice(n, m).relax(x, ZERO, temperature)
    np.testing.assert_allclose(array(found), relaxed_patterns(array(x), n, m, temperature), atol=1e-6)
    assert torch.allclose(found.view(-1, m).sum(dim=1), torch.tensor(float(n)))


@pytest.mark.parametrize("sizes", [[(3, 5)], [(3, 5), (4, 2)]])
@pytest.mark.parametrize("kept", [1, 7, 14])
def test_gates_equal_a_loop(sizes, kept):
    layers = [scores(*size, seed=seed) for seed, size in enumerate(sizes)]
    gates = Gates(kept)
    ordered = sorted(float(value) for layer in layers for value in layer.flatten())
    middle = (ordered[-kept] + ordered[-kept - 1]) / 2
    for layer in layers:
        expected = [[1 / (1 + math.exp(-(value - middle) / 0.5)) for value in row] for row in layer.tolist()]
        np.testing.assert_allclose(array(gates.relax(layer, gates.boundary(layers), 0.5)), expected, atol=1e-6)
    keep = gates.keep(layers)
    assert [mask.shape for mask in keep] == [layer.shape for layer in layers]
    assert sum(int(mask.sum()) for mask in keep) == kept
    assert all(torch.equal(mask, layer > middle) for mask, layer in zip(keep, layers, strict=True))


@pytest.mark.parametrize("relaxation", [PatternChoice(2, 4), PatternChoice(4, 8), Gates(20)])
def test_a_cold_relaxation_is_the_exact_mask(relaxation):
    x = scores(4, 16)
    (keep,) = relaxation.keep([x])
    assert torch.allclose(relaxation.relax(x, relaxation.boundary([x]), 1e-4), keep.float(), atol=1e-3)


@pytest.mark.parametrize("relaxation", [PatternChoice(2, 4), PatternChoice(1, 4), Gates(9)])
def test_gradients_equal_differences(relaxation):
    x = scores(2, 8).double()
    slopes, boundary = scores(2, 8, seed=1).double(), relaxation.boundary([x])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((relaxation.relax(leaf, boundary, 0.7) * slopes).sum(), leaf)
    for row, column in itertools.product(range(2), range(8)):
        step = torch.zeros_like(x)
        step[row, column] = 1e-6
        up, down = (relaxation.relax(x + s, boundary, 0.7) for s in (step, -step))
        assert float(((up - down) * slopes).sum() / 2e-6) == pytest.approx(float(gradient[row, column]), abs=1e-7)


@pytest.mark.parametrize(
    ("relaxation", "mean", "variance"),
    [
        (PatternChoice(2, 4), 0.5772, math.pi**2 / 6),
        (Gates(1), 0.0, math.pi**2 / 3),
    ],
)
def test_the_noise_has_its_distribution(relaxation, mean, variance):
    noise = relaxation.noise(torch.zeros(1000, 1000), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(mean, abs=0.01)
    assert float(noise.var()) == pytest.approx(variance, rel=0.01)
    assert noise.isfinite().all()


def test_the_keep_probability_of_gumbel_noise():
    """With n = 1 the most frequent pattern follows the softmax of the scores (the Gumbel-max trick)."""
    x, choice = torch.tensor([[1.0, 0.0, -1.0, 0.5]]), PatternChoice(1, 4)
    many = x.expand(200_000, 4)
    (keep,) = choice.keep([many + choice.noise(many, torch.Generator().manual_seed(0))])
    assert torch.allclose(keep.float().mean(dim=0), x.softmax(dim=1).squeeze(), atol=0.005)


def test_patterns_with_too_many_choices_are_refused():
    with pytest.raises(ValueError, match=r"pattern must have at most 100 choices.*8:16 has 12,870.*2:4 or 4:8"):
        PatternChoice(8, 16)
