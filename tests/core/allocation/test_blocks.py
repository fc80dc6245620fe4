"""Where more scores are outliers (OWL), or the tail of the spectrum is heavier (AlphaPruning), sparsity is lower."""

import math

import numpy as np
import pytest
import torch
from support import reference
from support.layers import allocate

from wanda_lightning.core.allocation import OWL, AlphaPruning, tail_exponent
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


def test_matrices_without_a_tail():
    assert math.isnan(tail_exponent(torch.ones(4, 8)))
    assert math.isnan(tail_exponent(torch.zeros(4, 8)))
    assert math.isfinite(tail_exponent(torch.eye(8)))
    flat = [("a", "a", torch.ones(4, 8), None), ("b", "b", torch.ones(8, 4), None)]
    assert allocate(AlphaPruning(), flat, 0.3) == {"a": 0.3, "b": 0.3}


def test_more_outliers_less_sparsity():
    weight = torch.ones(3, 8, 100)
    weight[1, :, 0], weight[2, :, :3] = 100, 100
    layers = [(name, name, weight[i], torch.ones(1, 100)) for i, name in enumerate("abc")]
    got = allocate(OWL(), layers, 0.5, Unstructured("layer"))
    assert got["a"] > got["b"] > got["c"]
    assert got["a"] - got["c"] == pytest.approx(2 * 0.08, abs=1e-2)
    assert allocate(OWL(lambda_=0.2), layers, 0.5, Unstructured("layer"))["c"] < got["c"]
    assert len(set(allocate(OWL(m=200.0), layers, 0.5).values())) == 1  # no outliers anywhere


def test_owl_keeps_within_what_a_layer_can_have():
    weight = torch.ones(2, 8, 100)
    weight[1, :, 0] = 100
    layers = [(name, name, weight[i], torch.ones(1, 100)) for i, name in enumerate("ab")]
    assert allocate(OWL(), layers, 0.02) == {"a": 0.04, "b": 0.0}
    assert allocate(OWL(lambda_=0.5), layers, 0.75) == {"a": 0.99, "b": 0.51}
