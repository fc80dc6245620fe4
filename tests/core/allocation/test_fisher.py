"""Fisher: one threshold for the scores of all layers."""

from functools import partial

import pytest
import torch
from support.layers import allocate

from wanda_lightning.core.allocation import DenseLayer, Fisher
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.statistics import GradientStatistics


def test_weights_that_matter_less_get_more_sparsity():
    """Above 60 %, the differences are limited by what is kept."""
    weight, tokens = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), torch.ones(1, 100)
    layers = [(name, name, weight * factor, tokens) for name, factor in (("a", 0.1), ("b", 1.0), ("c", 10.0))]
    for sparsity, deviation in ((0.5, 0.15), (0.6, 0.15), (0.7, 0.1125), (0.8, 0.075)):
        got = allocate(Fisher(), layers, sparsity, Unstructured("layer"))
        assert got["a"] - sparsity == pytest.approx(deviation, abs=0.01)
        assert sparsity - got["c"] == pytest.approx(deviation, abs=0.01)


def test_the_score_of_a_weight_is_its_square_times_input_and_row():
    """A layer whose rows differ loses what the product of both says, against scores written out."""
    generator = torch.Generator().manual_seed(0)
    layers, scores = [], {}
    for name in ("a", "b"):
        weight = torch.randn(6, 20, generator=generator)
        inputs, rows = torch.rand(20, generator=generator), torch.rand(6, generator=generator) ** 4
        gradients = GradientStatistics(inputs, rows)
        read = partial(torch.clone, weight)
        layers.append(DenseLayer(name, name, weight.numel(), weight.numel(), read, gradients=gradients))
        scores[name] = weight**2 * inputs * (rows / rows.mean())[:, None]
    got = Fisher(max_deviation=0.4)(layers, 0.5)
    threshold = torch.cat([each.flatten() for each in scores.values()]).median()
    for name, each in scores.items():
        assert got[name] == pytest.approx((each <= threshold).float().mean().item(), abs=0.01)
    assert abs(got["a"] - got["b"]) > 0.02
