"""PerLayer: given sparsities hold, and the other layers make up the difference."""

import pytest
import torch
from support.layers import allocate, dense_layer

from wanda_lightning.core.allocation import PerLayer

NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"]


def plain_layers(shape=(4, 100), names=NAMES):
    generator = torch.Generator().manual_seed(0)
    return [(name, name, torch.randn(shape, generator=generator), None) for name in names]


def test_the_other_layers_share_what_remains():
    got = allocate(PerLayer({"*.up": 0.8, "re:l.st": 0.1, "blocks.1": 0.2}), plain_layers(), 0.5)
    assert got == pytest.approx(dict(zip(NAMES, [0.8, 0.6, 0.8, 0.2, 0.1], strict=True)))
    assert allocate(PerLayer(), plain_layers(), 0.3) == dict.fromkeys(NAMES, 0.3)


def test_pairs_from_a_file_are_a_mapping():
    assert PerLayer((("a", 0.5),)) == PerLayer({"a": 0.5})
    assert hash(PerLayer({"a": 0.5})) == hash(PerLayer({"a": 0.5}))
    assert eval(repr(PerLayer({"a": 0.5}))) == PerLayer({"a": 0.5})


@pytest.mark.parametrize(
    ("sparsities", "texts"),
    [
        ({"blocks.0.upp": 0.6}, ["'blocks.0.upp' matches no pruned layer", "the nearest is 'blocks.0.up'"]),
        ({"*.up": 0.6, "blocks.0.up": 0.3}, ["'blocks.0.up' matches no pruned layer that no earlier pattern matches"]),
        ({"re:(": 0.6}, ["PerLayer pattern='re:(' must be a regular expression after 're:', but"]),
        ({"blocks": 0.9}, ["must be from 0.7200 to 0.9200", "a fraction 0.8000 of the weights", "but it is 0.5"]),
        ({"blocks": 0.1}, ["must be from 0.0800 to 0.2800"]),
        ({"*": 0.6}, ["must be from 0.6000 to 0.6000", "a fraction 1.0000 of the weights"]),
    ],
)
def test_per_layer_refuses(sparsities, texts):
    layers = [dense_layer(*layer) for layer in plain_layers()]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        PerLayer(sparsities).check(layers, 0.5)
    assert all(text in str(refusal.value) for text in texts), refusal.value


def test_all_layers_may_be_named():
    layers = plain_layers((4, 100))
    allocation = PerLayer({"*.up": 0.8, "*": 0.12344})
    allocation.check([dense_layer(*layer) for layer in layers], 0.3941)
    assert allocate(allocation, layers, 0.3941)["blocks.0.up"] == 0.8


def test_given_sparsities_hold_in_a_model_with_enough_zeros():
    layers = plain_layers()
    for _, _, weight, _ in layers:
        weight[:, :50] = 0
    got = allocate(PerLayer({"last": 0.7, "blocks.0.up": 0.2}), layers, 0.5)
    assert got == dict(zip(NAMES, [0.5, 0.5, 0.5, 0.5, 0.7], strict=True))
