"""Figures: readable without a network, in both themes, and several on one page."""

import re
import struct
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from support.reports import llama_report
from support.zoo import ZOO

pytest.importorskip("matplotlib", reason="figures need the extra report")

from wanda_lightning import prune
from wanda_lightning.report.figures import to_array, to_png, to_svg
from wanda_lightning.report.labels import spread_out
from wanda_lightning.report.plots import plots_of
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
