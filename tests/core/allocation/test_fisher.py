"""Fisher: one threshold for the scores of all layers."""

from functools import partial

import jaxtyping
import pytest
import torch
from support.layers import allocate, random_layers

from wanda_lightning.core.allocation import DenseLayer, Fisher
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.statistics import GradientStatistics


def test_weights_that_matter_less_get_more_sparsity():
    weight, tokens = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), torch.ones(1, 100)
    layers = [(name, name, weight * factor, tokens) for name, factor in (("a", 0.1), ("b", 1.0), ("c", 10.0))]
    got = allocate(Fisher(), layers, 0.5, Unstructured("layer"))
    assert got["a"] == pytest.approx(0.65, abs=0.01)
    assert got["c"] == pytest.approx(0.35, abs=0.01)


def test_no_layer_deviates_by_more_than_is_allowed():
    for deviation in (0.0, 0.05, 0.3):
        got = allocate(Fisher(max_deviation=deviation), list(random_layers()), 0.5, Unstructured("layer"))
        assert max(abs(value - 0.5) for value in got.values()) <= deviation + 0.02


def test_a_stage_of_a_schedule_scales_the_differences():
    assert Fisher(num_samples=4).scaled(0.2) == Fisher(max_deviation=0.03, num_samples=4)


def test_samples_that_are_passed_backward():
    assert Fisher().gradient_limit == (None, 0)
    assert Fisher(num_samples=4, num_predictions=9).gradient_limit == (4, 9)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_deviation": 1.5}, "max_deviation of Fisher must be a number of at least 0 and at most 1, but it is 1.5"),
        ({"num_samples": 0}, "num_samples of Fisher must be a whole number of at least 1, but it is 0"),
        ({"num_predictions": -1}, "num_predictions of Fisher must be a whole number of at least 0, but it is -1"),
        ({"num_samples": 1.5}, "num_samples of Fisher must be a whole number of at least 1, but it is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(values, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # beartype refuses some before we do
    with pytest.raises(ValueError, match=text):
        Fisher(**values)


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
