"""Laws of single allocations, and how sparsities meet the target; what all of them promise is in `test_contract.py`."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.layers import allocate, dense_layer, rng

from wanda_lightning.core.allocation import OWL, DenseLayer, Fisher, PerLayer, match_target
from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.statistics import GradientStatistics


@pytest.fixture
def layers_with_outliers():
    """One hundredth of the weights of `b` are outliers, and none of `a`."""
    plain = torch.ones(8, 100)
    with_outliers = plain.clone()
    with_outliers[:, 0] = 100
    tokens = torch.ones(1, 100)
    return [("a", "a", plain, tokens), ("b", "b", with_outliers, tokens)]


def test_without_outliers_all_layers_get_one_sparsity(layers_with_outliers):
    sparsities = allocate(OWL(m=200.0), layers_with_outliers, 0.5)
    assert sparsities["a"] == sparsities["b"]


def test_outliers_get_at_most_what_a_layer_can_have(layers_with_outliers):
    assert allocate(OWL(), layers_with_outliers, 0.02) == {"a": 0.04, "b": 0.0}
    assert allocate(OWL(lambda_=0.5), layers_with_outliers, 0.75) == {"a": 0.99, "b": 0.51}


@pytest.mark.parametrize(
    ("sparsity", "deviation"), [(0.5, 0.15), (0.6, 0.15), (0.7, 0.1125), (0.8, 0.075)]
)
def test_weights_that_matter_less_get_more_sparsity(sparsity, deviation):
    """Above 60 %, the differences are limited by what is kept."""
    weight = torch.randn(8, 100, generator=rng())
    tokens = torch.ones(1, 100)
    layers = [
        ("a", "a", weight * 0.1, tokens),
        ("b", "b", weight, tokens),
        ("c", "c", weight * 10, tokens),
    ]
    sparsities = allocate(Fisher(), layers, sparsity, Unstructured("layer"))
    assert sparsities["a"] - sparsity == pytest.approx(deviation, abs=0.01)
    assert sparsity - sparsities["c"] == pytest.approx(deviation, abs=0.01)


def test_the_score_of_a_weight_is_its_square_times_input_and_row():
    """Layers whose rows differ get the fractions of their scores, written out, below the median of all scores."""
    generator = rng()
    layers = []
    scores = []
    for name in ("a", "b"):
        weight = torch.randn(6, 20, generator=generator)
        inputs = torch.rand(20, generator=generator)
        rows = torch.rand(6, generator=generator) ** 4
        gradients = GradientStatistics(inputs, rows)
        layers.append(DenseLayer(name, name, 120, 120, weight.clone, gradients=gradients))
        scores.append(weight**2 * inputs * (rows / rows.mean())[:, None])

    sparsities = Fisher(max_deviation=0.4)(layers, 0.5)
    a, b = (torch.stack(scores) <= torch.stack(scores).median()).float().mean(dim=(1, 2)).tolist()
    assert sparsities == pytest.approx({"a": a, "b": b}, abs=0.01)
    assert abs(sparsities["a"] - sparsities["b"]) > 0.02


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"]


def plain_layers():
    generator = rng()
    return [(name, name, torch.randn(4, 100, generator=generator), None) for name in NAMES]


@pytest.mark.parametrize(
    ("allocation", "sparsity", "expected"),
    [
        (PerLayer({"*.up": 0.8, "re:l.st": 0.1, "blocks.1": 0.2}), 0.5, [0.8, 0.6, 0.8, 0.2, 0.1]),
        (PerLayer(), 0.3, [0.3] * 5),
        # All layers are given, in steps of 0.01.
        (PerLayer({"*.up": 0.8, "*": 0.12344}), 0.3941, [0.8, 0.13, 0.8, 0.12, 0.12]),
    ],
)
def test_the_other_layers_share_what_remains(allocation, sparsity, expected):
    allocation.check([dense_layer(*layer) for layer in plain_layers()], sparsity)
    assert allocate(allocation, plain_layers(), sparsity) == pytest.approx(
        dict(zip(NAMES, expected, strict=True))
    )


def test_given_sparsities_hold_in_a_model_with_enough_zeros():
    layers = plain_layers()
    for _, _, weight, _ in layers:
        weight[:, :50] = 0
    assert allocate(PerLayer({"last": 0.7, "blocks.0.up": 0.2}), layers, 0.5) == dict.fromkeys(
        NAMES, 0.5
    ) | {"last": 0.7}


@pytest.mark.parametrize(
    ("sparsities", "texts"),
    [
        (
            {"blocks.0.upp": 0.6},
            ["'blocks.0.upp' matches no pruned layer", "the nearest is 'blocks.0.up'"],
        ),
        (
            {"*.up": 0.6, "blocks.0.up": 0.3},
            ["'blocks.0.up' matches no pruned layer that no earlier pattern matches"],
        ),
        ({"re:(": 0.6}, ["PerLayer pattern='re:(' must be a regular expression after 're:', but"]),
        (
            {"blocks": 0.9},
            ["must be from 0.7200 to 0.9200", "a fraction 0.8000 of the weights", "but it is 0.5"],
        ),
        ({"blocks": 0.1}, ["must be from 0.0800 to 0.2800"]),
        ({"*": 0.6}, ["must be from 0.6000 to 0.6000", "a fraction 1.0000 of the weights"]),
    ],
)
def test_per_layer_refuses(sparsities, texts):
    layers = [dense_layer(*layer) for layer in plain_layers()]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        PerLayer(sparsities).check(layers, 0.5)
    assert all(text in str(refusal.value) for text in texts), refusal.value


def test_pairs_from_a_file_are_a_mapping():
    from_file = PerLayer((("a", 0.5),))
    assert from_file == PerLayer({"a": 0.5})
    assert hash(from_file) == hash(PerLayer({"a": 0.5}))


@given(st.integers(1, 300), st.data())
def test_a_step_is_not_lost_to_rounding(levels, data):
    step = data.draw(st.integers(0, levels - 1))
    layers = [dense_layer(name, name, torch.ones(1, levels)) for name in ("a", "b")]
    sparsities = match_target(layers, {"a": 0.0, "b": 0.0}, 0.0, fixed={"a": step / levels})
    assert int(levels * sparsities["a"]) == step


@given(
    seed=st.integers(0, 2**31),
    heights=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    n=st.integers(1, 15),
)
@settings(max_examples=20)
def test_mixed_n_of_m_has_the_mean_of_n_of_m(seed, heights, n):
    pattern = NM(n, 16)
    names = [str(index) for index in range(len(heights))]
    layers = [
        dense_layer(name, name, torch.ones(d_out, 16), None, pattern)
        for name, d_out in zip(names, heights, strict=True)
    ]
    drawn = torch.rand(len(heights), generator=rng(seed))
    wanted = dict(zip(names, drawn.tolist(), strict=True))
    sparsities = match_target(layers, wanted, pattern.sparsity)

    survivors = {}
    for name, sparsity in sparsities.items():
        chosen = pattern.for_sparsity(sparsity)
        survivors[name] = chosen.n if isinstance(chosen, NM) else 16
    assert min(survivors.values()) >= 1
    total = sum(survivors[name] * d_out for name, d_out in zip(names, heights, strict=True))
    assert abs(total - n * sum(heights)) <= max(heights) / 2
    for a, b in itertools.permutations(names, 2):
        if wanted[a] < wanted[b]:  # then b is at most one step of sparsity below a
            assert survivors[b] <= survivors[a] + 1
