"""AlphaPruning: where the tail of the spectrum is heavier, sparsity is lower."""

import math

import numpy as np
import pytest
import torch
from support import reference
from support.layers import allocate

from wanda_lightning.core.allocation import AlphaPruning, tail_exponent
from wanda_lightning.core.patterns import Unstructured


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_tail_exponent_of_a_pareto_spectrum(exponent):
    rng = np.random.default_rng(0)
    eigenvalues = rng.pareto(exponent - 1, 400) + 1
    basis = [np.linalg.qr(rng.standard_normal((400, 400)))[0] for _ in range(2)]
    weight = torch.from_numpy(basis[0] @ np.diag(eigenvalues**0.5) @ basis[1])
    got = tail_exponent(weight)
    assert got == pytest.approx(reference.hill(reference.array(weight)), rel=1e-9)
    assert got == pytest.approx(exponent, rel=0.15)
    assert tail_exponent(weight.float()) == pytest.approx(got, rel=1e-4)
    assert tail_exponent(7 * weight) == pytest.approx(got, rel=1e-9)
    assert tail_exponent(weight[:, :100].T) == pytest.approx(tail_exponent(weight[:, :100]), rel=1e-9)


def spectrum(singular_values):
    """A matrix with these singular values and without zeros."""
    generator = torch.Generator().manual_seed(0)
    size = len(singular_values)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return left @ torch.diag(singular_values) @ right


def test_matrices_without_a_tail():
    assert math.isnan(tail_exponent(torch.ones(4, 8)))
    assert math.isnan(tail_exponent(torch.zeros(4, 8)))
    assert math.isfinite(tail_exponent(torch.eye(8)))
    flat = [("a", "a", torch.ones(4, 8), None), ("b", "b", torch.ones(8, 4), None)]
    assert allocate(AlphaPruning(), flat, 0.3) == {"a": 0.3, "b": 0.3}
    spectra = [("c", "c", spectrum(torch.ones(8)), None), ("d", "d", spectrum(torch.arange(1.0, 9)), None)]
    got = allocate(AlphaPruning(), flat + spectra, 0.5, Unstructured("layer"))
    assert got["d"] < got["a"] < got["c"]
    assert got["a"] == pytest.approx(got["b"], abs=1 / 32)
