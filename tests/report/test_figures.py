"""Figures: the numbers they show, compared with plain loops, and how they look in both themes, several on one page."""

import re
import struct
from collections import Counter
from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pairwise import with_nightly
from support.reports import llama_report
from support.zoo import ZOO

pytest.importorskip("matplotlib", reason="figures need the extra report")

from wanda_lightning import prune
from wanda_lightning.report.figures import (
    COLORS,
    color_range,
    expert_tokens,
    layer_grid,
    part_grid,
    plots_of,
    shortest_ends,
    spread_out,
    to_array,
    to_png,
    to_svg,
    weights_by_kind,
)


@cache
def pruned(name, **choices):
    model = ZOO[name].build()
    return model, prune(model, ZOO[name].batches(), 0.5, progress=False, **choices)


def test_values_by_kind_and_block():
    _, report = pruned("llama", method="sparsegpt", allocation="owl")
    by_name = {layer.name: layer for layer in report.layers}
    sparsity, errors = layer_grid(report, "sparsity"), layer_grid(report, "error")
    assert sparsity.blocks == errors.blocks == ["model.layers.0", "model.layers.1"]
    assert len(sparsity.kinds) * len(sparsity.blocks) == len(by_name)
    for kind, zeros, error in zip(sparsity.kinds, sparsity.values, errors.values, strict=True):
        layers = [by_name[f"{block}.{kind}"] for block in sparsity.blocks]
        assert zeros == pytest.approx([layer.sparsity for layer in layers])
        assert error == pytest.approx([layer.error for layer in layers])
    assert sparsity.labels == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_experts_of_a_block_are_one_kind():
    _, report = pruned("mixtral")
    grid = layer_grid(report, "sparsity")
    experts = [layer for layer in report.layers if layer.siblings]
    kinds = {layer.siblings.removeprefix(f"{layer.block}.") for layer in experts}
    assert {kind for kind in grid.kinds if "*" in kind} == kinds
    found = expert_tokens(report)
    assert list(found) == grid.blocks
    for block, numbers in found.items():
        layers = [layer for layer in experts if layer.block == block]
        tokens = sorted(layer.tokens for layer in layers)
        pooled = sum("statistics of all experts" in layer.note for layer in layers)
        middle = (tokens[(len(tokens) - 1) // 2] + tokens[len(tokens) // 2]) / 2
        assert list(numbers.values()) == [len(layers), tokens[0], middle, tokens[-1], pooled]


@pytest.mark.parametrize("name", with_nightly(["llama", "mixtral", "t5", "vit", "resnet18"], ZOO))
def test_every_parameter_is_counted_once(name):
    model, report = pruned(name)
    found = weights_by_kind(report)
    names, zeros, kept, dense = zip(*found, strict=True)
    assert sum(zeros + kept + dense) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(zeros) == sum(layer.zeros for layer in report.layers)
    assert len(set(names)) == len(found) <= 14
    grid = layer_grid(report, "sparsity")
    assert len(set(grid.labels)) == len(grid.kinds)
    assert all(kind.replace(".*", "").endswith(label) for kind, label in zip(grid.kinds, grid.labels, strict=True))


def test_parts_that_were_trained():
    _, report = pruned("llama", recovery="reconstruct")
    grid = part_grid(report)
    assert grid.kinds == ["self_attn before", "self_attn after", "mlp before", "mlp after"]
    for block, *values in zip(grid.blocks, *grid.values, strict=True):
        parts = [
            next(layer.part for layer in report.layers if layer.name.startswith(f"{block}.{name}"))
            for name in ("self_attn", "mlp")
        ]
        assert values == [error for part in parts for error in (part.before, part.after)]


def test_lists_of_blocks_are_told_apart():
    grid = layer_grid(pruned("t5")[1], "sparsity")
    encoders = sum(block.startswith("encoder") for block in grid.blocks)
    assert list(grid.stacks.items()) == [("encoder.block", 0), ("decoder.block", encoders)]


def test_which_figures_a_report_has():
    assert [plot.name for plot in plots_of(llama_report())] == ["sparsity", "error", "weights", "training"]
    _, report = pruned("mixtral")
    assert [plot.name for plot in plots_of(report)] == ["weights", "experts"]


def test_svg_has_colors_of_the_page_and_ids_of_its_own():
    texts = [to_svg(plot, width) for plot in plots_of(llama_report(4)) for width in (970, 360)]
    for text in texts:
        assert text.startswith("<svg")
        used = set(re.findall(r"var\(--([\w-]+)\)", text))
        assert used <= COLORS.keys()
        assert {"ink", "muted"} & used
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", text)
        assert "http" not in text
        assert "DejaVu" not in text
        ids, references = re.findall(r' id="([^"]+)"', text), re.findall(r'(?:href="|url\()#([^")]+)', text)
        assert set(ids) == set(references)
        assert len(set(ids)) == len(ids)
    everywhere = [found for text in texts for found in re.findall(r' id="([^"]+)"', text)]
    assert len(set(everywhere)) == len(everywhere)


def test_text_of_figures_is_not_rounded_and_the_same_each_time():
    (plot, *_) = plots_of(llama_report(3))

    def draw(axes, width):
        axes.text(0.123456, 0.5, "run-0.6251")

    svg = to_svg(replace(plot, draw=draw), 400)
    assert ">run-0.6251<" in svg
    assert not re.search(r"\d\.\d{3}", svg.replace("run-0.6251", ""))
    assert svg == to_svg(replace(plot, draw=draw), 400)


def test_svg_names_each_kind_and_each_value():
    report = llama_report(3)
    text = to_svg(plots_of(report)[0], 970)
    cells = re.findall(r">(\d+)</text>", text)
    assert Counter(f"{100 * layer.sparsity:.0f}" for layer in report.layers) <= Counter(cells)
    assert all(f">{kind}</text>" in text for kind in ("q_proj", "down_proj"))


def spread_of_colors(report):
    """Largest difference in brightness between the cells of the heat map, which are wider than any letter."""
    image = to_array(plots_of(report)[0], width=970).astype(int)
    rows = image[10:-45:6, 150:-10]  # without the labels
    plain = [
        row[start] for row in rows for start in range(row.shape[0] - 4) if (row[start : start + 5] == row[start]).all()
    ]
    blue = [color.sum() for color in plain if color[2] > color[0] + 5]  # no surface, no ink
    return max(blue) - min(blue)


def test_nearly_uniform_sparsities_look_nearly_uniform():
    wide = llama_report(2)
    narrow = replace(wide, layers=[replace(each, sparsity=0.5 + 0.01 * (each.sparsity - 0.5)) for each in wide.layers])
    assert spread_of_colors(narrow) < spread_of_colors(wide) / 10
    label = re.search(r"from (\S+)% \(pale\) to (\S+)% \(strong\)", to_svg(plots_of(narrow)[0], 970))
    assert float(label[2]) - float(label[1]) == pytest.approx(10)


def test_kinds_are_named_by_their_shortest_ends():
    names = ["self_attn.q_proj", "encoder.mlp.up", "decoder.mlp.up", "up"]
    assert shortest_ends(names) == ["q_proj", "encoder.mlp.up", "decoder.mlp.up", "up"]


def test_the_smallest_kinds_are_added_up():
    report = llama_report(2)
    found, all_kinds = weights_by_kind(report, most=4), weights_by_kind(report)
    assert found[:3] == all_kinds[:3]
    others = [sum(numbers) for numbers in list(zip(*all_kinds[3:], strict=True))[1:]]
    assert found[3:] == [(f"{len(all_kinds) - 3} others", *others)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_colors_span_all_values_and_the_least_range(values, least):
    low, high = color_range(values, least)
    assert low <= min(values) + 1e-9
    assert high >= max(values) - 1e-9
    assert low >= -1e-9
    assert high <= 1 + 1e-9
    assert high - low == pytest.approx(max(least, max(values) - min(values)))


def test_png_and_array_have_the_same_width():
    file = BytesIO()
    plots = plots_of(llama_report(2))[:2]
    to_png(plots, file, "a $ title", width=600)
    data = file.getvalue()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", data[16:20])[0] == 1200
    image = to_array(plots[0], width=600)
    assert image.dtype == np.uint8
    assert image.shape[1:] == (600, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_labels_are_moved_apart_as_little_as_needed():
    assert spread_out([1, 1, 1], 2, 0, 10) == [1, 3, 5]
    assert spread_out([9, 10, 10], 2, 0, 10) == [6, 8, 10]
    assert spread_out([5, 1], 2, 0, 10) == [5, 1]
    assert spread_out([1.0, 1.1, 5.0], 1.0, 0.0, 10.0) == [1, 2, 5]
