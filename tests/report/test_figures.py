"""Figures: the numbers they show, compared with plain loops, and their colors."""

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from support.pairwise import with_nightly
from support.reports import llama_report
from support.zoo import ZOO

pytest.importorskip("matplotlib", reason="figures need the extra report")

from matplotlib import rc_params_from_file

from wanda_lightning import prune
from wanda_lightning.report import figures
from wanda_lightning.report.figures import COLORS, layer_grid, plots_of, to_figure, to_svg


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
    (plot, *_) = plots_of(report)
    assert all(f">{100 * layer.sparsity:.0f}</text>" in to_svg(plot, 970) for layer in report.layers)
    encoder, decoder = layer_grid(pruned("t5")[1], "sparsity").stacks.items()
    assert (encoder, decoder[0]) == (("encoder.block", 0), "decoder.block")
    names = ["self_attn.q_proj", "encoder.mlp.up", "decoder.mlp.up", "up"]
    assert figures.shortest_ends(names) == ["q_proj", *names[1:]]
    assert sparsity.labels == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_experts_of_a_block_are_one_kind():
    _, report = pruned("mixtral")
    grid = layer_grid(report, "sparsity")
    experts = [layer for layer in report.layers if layer.siblings]
    kinds = {layer.siblings.removeprefix(f"{layer.block}.") for layer in experts}
    assert {kind for kind in grid.kinds if "*" in kind} == kinds
    assert [plot.name for plot in plots_of(report)] == ["weights"]


@pytest.mark.parametrize("name", with_nightly(["llama", "mixtral", "t5", "vit", "resnet18"], ZOO))
def test_every_parameter_is_counted_once(name):
    model, report = pruned(name)
    found = figures.weights_by_kind(report)
    names, zeros, kept, dense = zip(*found, strict=True)
    assert sum(zeros + kept + dense) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(zeros) == sum(layer.zeros for layer in report.layers)
    assert len(set(names)) == len(found)
    grid = layer_grid(report, "sparsity")
    assert len(set(grid.labels)) == len(grid.kinds)
    assert all(kind.replace(".*", "").endswith(label) for kind, label in zip(grid.kinds, grid.labels, strict=True))


def test_the_style_and_figures_have_only_colors_that_the_page_replaces():
    style = rc_params_from_file(figures._STYLE, use_default_template=False)
    assert {value for name, value in style.items() if "color" in name} <= set(COLORS.values())
    assert [plot.name for plot in plots_of(llama_report(4))] == ["sparsity", "error", "weights"]
    texts = [to_svg(plot, width) for plot in plots_of(llama_report(4)) for width in (970, 360)]
    for text in texts:
        assert {color for _, color in re.findall(r"(fill|stroke): (#\w+)", text)} <= set(COLORS.values())
        assert COLORS["ink"] in text
    assert texts[0] == to_svg(plots_of(llama_report(4))[0], 970)
    ids = [{*re.findall(r'(?:href="|url\()#([^")]+)', text)} for text in texts]
    assert sum(map(len, ids)) == len(set.union(*ids))  # no figure refers to a shape of another


def test_nearly_uniform_sparsities_look_nearly_uniform():
    wide = llama_report(2)
    narrow = replace(wide, layers=[replace(each, sparsity=0.5 + 0.01 * (each.sparsity - 0.5)) for each in wide.layers])
    spreads = []
    for report in (wide, narrow):
        text = to_svg(plots_of(report)[0], 970)
        strengths = [float(found) for found in re.findall(rf"fill: {COLORS['accent']}; fill-opacity: ([\d.]+)", text)]
        spreads.append(max(strengths) - min(strengths))
    assert spreads[1] < spreads[0] / 10
    low, high = map(float, re.search(r"from (\S+)% \(pale\) to (\S+)% \(strong\)", text).groups())
    assert high - low == pytest.approx(10)


def test_labels_of_lines_are_at_their_ends_in_order_and_apart():
    report = llama_report(2)
    layers = [replace(each, error=0.2 if "mlp" in each.name else 0.1 * each.error) for each in report.layers]
    (axes,) = to_figure(plots_of(replace(report, layers=layers))[1:2]).subfigs[0].axes
    axes.figure.figure.draw_without_rendering()
    box = axes.get_window_extent()
    places = {text.get_text(): text.xy[1] for text in axes.texts}
    ends = {line.get_label(): line.get_ydata()[-1] / axes.get_ylim()[1] for line in axes.get_lines()}
    assert sorted(places, key=lambda name: (ends[name], places[name])) == sorted(places, key=places.__getitem__)
    heights = sorted(place * box.height for place in places.values())
    assert all(high - low >= 12 for low, high in pairwise(heights))
    assert heights[-1] <= box.height
    assert all(abs(places[name] - ends[name]) < 0.4 for name in places)
