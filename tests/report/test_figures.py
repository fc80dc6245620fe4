"""Figures: readable without a network, in both themes, and several on one page."""

import re
import struct
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reports import llama_report
from support.zoo import ZOO

pytest.importorskip("matplotlib", reason="figures need the extra report")

from wanda_lightning import prune
from wanda_lightning.report.figures import to_array, to_png, to_svg
from wanda_lightning.report.labels import spread_out
from wanda_lightning.report.plots import color_range, plots_of
from wanda_lightning.report.theme import COLORS


def test_a_report_with_everything_has_all_figures_but_experts():
    assert [plot.name for plot in plots_of(llama_report())] == ["sparsity", "error", "weights", "training"]


def test_experts_have_a_figure():
    specimen = ZOO["mixtral"]
    report = prune(specimen.build(), specimen.batches(), 0.5, progress=False)
    assert [plot.name for plot in plots_of(report)] == ["weights", "experts"]


def test_svg_has_colors_of_the_page_and_ids_of_its_own():
    texts = [to_svg(plot, width) for plot in plots_of(llama_report()) for width in (970, 360)]
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


def test_text_of_figures_is_not_rounded():
    (plot, *_) = plots_of(llama_report())

    def draw(axes, width):
        axes.text(0.123456, 0.5, "run-0.6251")

    svg = to_svg(replace(plot, draw=draw), 400)
    assert ">run-0.6251<" in svg
    assert not re.search(r"\d\.\d{3}", svg.replace("run-0.6251", ""))


def test_svg_is_the_same_each_time():
    one, other = (to_svg(plots_of(llama_report())[0], 970) for _ in range(2))
    assert one == other


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
    plots = plots_of(llama_report(2))
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
