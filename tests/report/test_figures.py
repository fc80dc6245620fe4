"""Figures: the numbers they show, compared with plain loops."""

from functools import cache

import pytest
from support.pairwise import with_nightly
from support.quiet import prune
from support.zoo import ZOO, batches_of, model_of, number_of_weights

from wanda_lightning.report.figures import (
    Grid,
    plots_of,
    shortest_ends,
    to_svg,
    weights_by_kind,
)


@cache
def pruned(name, **choices):
    model = model_of(name)
    return model, prune(model, batches_of(name), 0.5, **choices)


def test_values_by_kind_and_block():
    _, report = pruned("llama", method="sparsegpt", allocation="owl")
    by_name = {layer.name: layer for layer in report.layers}
    sparsity = Grid(report, "sparsity")
    errors = Grid(report, "error")
    assert sparsity.blocks == errors.blocks == ["model.layers.0", "model.layers.1"]
    assert len(sparsity.kinds) * len(sparsity.blocks) == len(by_name)
    for kind, zeros, error in zip(sparsity.kinds, sparsity.values, errors.values, strict=True):
        layers = [by_name[f"{block}.{kind}"] for block in sparsity.blocks]
        assert zeros == pytest.approx([layer.sparsity for layer in layers])
        assert error == pytest.approx([layer.error for layer in layers])
    labels = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert sparsity.labels == labels.split()

    drawn = to_svg(plots_of(report)[0], 970)
    for layer in report.layers:
        assert f">{100 * layer.sparsity:.0f}</text>" in drawn


def test_a_second_list_of_blocks_begins_at_its_first_block():
    _, report = pruned("t5")
    grid = Grid(report, "sparsity")
    layers_of_encoder = sum(block.startswith("encoder") for block in grid.blocks)
    assert grid.stacks == {"encoder.block": 0, "decoder.block": layers_of_encoder}


def test_a_label_is_the_shortest_end_that_no_other_name_has():
    names = ["self_attn.q_proj", "encoder.mlp.up", "decoder.mlp.up", "up"]
    assert shortest_ends(names) == ["q_proj", *names[1:]]


def test_experts_of_a_block_are_one_kind():
    _, report = pruned("mixtral")
    grid = Grid(report, "sparsity")
    experts = [layer for layer in report.layers if layer.siblings]
    assert {kind for kind in grid.kinds if "*" in kind} == {
        layer.siblings.removeprefix(f"{layer.block}.") for layer in experts
    }
    assert [plot.name for plot in plots_of(report)] == ["weights"]


@pytest.mark.parametrize("name", with_nightly(["llama", "mixtral", "t5", "vit", "resnet18"], ZOO))
def test_every_parameter_is_counted_once_and_every_kind_has_a_label_of_its_own(name):
    model, report = pruned(name)
    bars = weights_by_kind(report)
    assert sum(bar.size for bar in bars) == number_of_weights(model)
    assert sum(bar.zeros for bar in bars) == sum(layer.zeros for layer in report.layers)
    assert len({bar.name for bar in bars}) == len(bars)

    grid = Grid(report, "sparsity")
    assert len(set(grid.labels)) == len(grid.kinds)
    for kind, label in zip(grid.kinds, grid.labels, strict=True):
        assert kind.replace(".*", "").endswith(label)
