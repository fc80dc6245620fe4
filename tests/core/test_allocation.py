"""Laws of single allocations, and how sparsities meet the target; what all of them promise is in `test_contract.py`."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.layers import allocate, dense_layer

from wanda_lightning.core.allocation import OWL, DenseLayer, Fisher, PerLayer, match_target
from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.statistics import GradientStatistics


def test_outliers_get_at_most_what_a_layer_can_have():
    weight = torch.ones(2, 8, 100)
    weight[1, :, 0] = 100
    layers = [(name, name, weight[i], torch.ones(1, 100)) for i, name in enumerate("ab")]
    assert len(set(allocate(OWL(m=200.0), layers, 0.5).values())) == 1  # no outliers anywhere
    assert allocate(OWL(), layers, 0.02) == {"a": 0.04, "b": 0.0}
    assert allocate(OWL(lambda_=0.5), layers, 0.75) == {"a": 0.99, "b": 0.51}


def test_weights_that_matter_less_get_more_sparsity():
    """Above 60 %, the differences are limited by what is kept."""
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    tokens = torch.ones(1, 100)
    layers = [
        (name, name, weight * factor, tokens)
        for name, factor in (("a", 0.1), ("b", 1.0), ("c", 10.0))
    ]
    for sparsity, deviation in ((0.5, 0.15), (0.6, 0.15), (0.7, 0.1125), (0.8, 0.075)):
        got = allocate(Fisher(), layers, sparsity, Unstructured("layer"))
        assert got["a"] - sparsity == pytest.approx(deviation, abs=0.01)
        assert sparsity - got["c"] == pytest.approx(deviation, abs=0.01)


def test_the_score_of_a_weight_is_its_square_times_input_and_row():
    """A layer whose rows differ loses what the product of both says, against scores written out."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    scores = {}
    for name in ("a", "b"):
        weight = torch.randn(6, 20, generator=generator)
        inputs = torch.rand(20, generator=generator)
        rows = torch.rand(6, generator=generator) ** 4
        gradients = GradientStatistics(inputs, rows)
        read = partial(torch.clone, weight)
        layers.append(
            DenseLayer(name, name, weight.numel(), weight.numel(), read, gradients=gradients)
        )
        scores[name] = weight**2 * inputs * (rows / rows.mean())[:, None]
    got = Fisher(max_deviation=0.4)(layers, 0.5)
    threshold = torch.cat([each.flatten() for each in scores.values()]).median()
    for name, each in scores.items():
        assert got[name] == pytest.approx((each <= threshold).float().mean().item(), abs=0.01)
    assert abs(got["a"] - got["b"]) > 0.02


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"]


def plain_layers():
    generator = torch.Generator().manual_seed(0)
    return [(name, name, torch.randn(4, 100, generator=generator), None) for name in NAMES]


@pytest.mark.parametrize(
    ("allocation", "sparsity", "expected"),
    [
        (PerLayer({"*.up": 0.8, "re:l.st": 0.1, "blocks.1": 0.2}), 0.5, [0.8, 0.6, 0.8, 0.2, 0.1]),
        (PerLayer(), 0.3, [0.3] * 5),
        (
            PerLayer({"*.up": 0.8, "*": 0.12344}),
            0.3941,
            [0.8, 0.13, 0.8, 0.12, 0.12],
        ),  # all, in steps of 0.01
    ],
)
def test_the_other_layers_share_what_remains(allocation, sparsity, expected):
    allocation.check([dense_layer(*layer) for layer in plain_layers()], sparsity)
    got = allocate(allocation, plain_layers(), sparsity)
    assert got == pytest.approx(dict(zip(NAMES, expected, strict=True)))


def test_given_sparsities_hold_in_a_model_with_enough_zeros():
    layers = plain_layers()
    for _, _, weight, _ in layers:
        weight[:, :50] = 0
    got = allocate(PerLayer({"last": 0.7, "blocks.0.up": 0.2}), layers, 0.5)
    assert got == dict(zip(NAMES, [0.5, 0.5, 0.5, 0.5, 0.7], strict=True))


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
    assert PerLayer((("a", 0.5),)) == PerLayer({"a": 0.5})
    assert hash(PerLayer({"a": 0.5})) == hash(PerLayer({"a": 0.5}))


@given(st.integers(1, 300), st.data())
def test_a_step_is_not_lost_to_rounding(levels, data):
    step = data.draw(st.integers(0, levels - 1))
    weight = torch.ones(1, levels)
    layers = [dense_layer("a", "a", weight), dense_layer("b", "b", weight)]
    got = match_target(layers, {"a": 0.0, "b": 0.0}, 0.0, fixed={"a": step / levels})["a"]
    assert int(levels * got) == step


@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    n=st.integers(1, 15),
)
@settings(max_examples=20)
def test_mixed_n_of_m_has_the_mean_of_n_of_m(seed, shapes, n):
    pattern = NM(n, 16)
    generator = torch.Generator().manual_seed(seed)
    layers = [(str(i), str(i), torch.ones(d_out, 16), None) for i, d_out in enumerate(shapes)]
    wanted = {name: float(torch.rand((), generator=generator)) for name, _, _, _ in layers}
    got = match_target([dense_layer(*layer, pattern) for layer in layers], wanted, pattern.sparsity)
    chosen = {name: pattern.for_sparsity(sparsity) for name, sparsity in got.items()}
    survivors = {name: kind.n if isinstance(kind, NM) else 16 for name, kind in chosen.items()}
    assert all(count >= 1 for count in survivors.values())
    assert (
        abs(sum(survivors[str(i)] * d_out for i, d_out in enumerate(shapes)) - n * sum(shapes))
        <= max(shapes) / 2
    )
    for a in wanted:
        for b in wanted:
            if wanted[a] < wanted[b]:
                assert survivors[a] + 1 >= survivors[b], (
                    "who should have more sparsity has no more than one step less"
                )
