"""OWL: where more scores are outliers, sparsity is lower."""

import pytest
import torch
from support.layers import allocate

from wanda_lightning.core.allocation import OWL
from wanda_lightning.core.patterns import Unstructured


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
