"""The table of several models, and sparsity against counts by hand."""

import io
from importlib.metadata import version

import torch
from rich.console import Console
from support.reports import read_json
from torch import nn

from wanda_lightning.evaluation import Evaluation, sparsity_of


def test_sparsity_is_counted_by_parameter():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[:, 1:3] = 0
        model[0].bias.fill_(1)
        model[2].weight.fill_(1)
        model[2].bias.fill_(1)
    # 24 + 12 weights; 6 + 6 + 6 + 2 other parameters, of which the 6 biases of the norm are zero
    assert sparsity_of(model) == {"layers": 12 / 36, "model": 18 / 56}


def rows_of(evaluation):
    """The cells of each row of a table, by its heading."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(evaluation.table())
    rows = {}
    for line in console.export_text().splitlines():
        if line.startswith("│"):
            heading, *cells = [cell.strip() for cell in line.strip("│").split("│")]
            rows[heading] = cells
    return rows


MODELS = {
    "dense": {
        "sparsity": {"layers": 0.0, "model": 0.0},
        "a.txt": {"perplexity": 10.0, "windows": 5},
        "rte": {"acc": 0.5, "acc_stderr": 0.03, "documents": 1277},
    },
    "pruned": {
        "sparsity": {"layers": 0.5, "model": 0.25},
        "a.txt": {"perplexity": 12.5, "windows": 5},
        "rte": {"acc": 0.25, "acc_stderr": 0.025, "documents": 1277},
    },
}


def test_the_table_shows_errors_counts_and_differences():
    assert rows_of(Evaluation(MODELS, dense="dense")) == {
        "sparsity of prunable layers": ["0.00%", "50.00% (+50.00)"],
        "sparsity of the model": ["0.00%", "25.00% (+25.00)"],
        "a.txt perplexity (5 windows)": ["10.00", "12.50 (+2.50)"],
        "rte acc (1,277 documents)": ["50.00% ± 3.00", "25.00% ± 2.50 (-25.00)"],
    }


def test_a_model_may_lack_a_result():
    models = {
        **MODELS,
        "other": {
            "rte": {"acc": 0.5, "documents": 2},
            "dog [pictures]": {"top-1": 0.1, "images": 3},
        },
    }
    rows = rows_of(Evaluation(models))
    assert rows["rte acc (1,277 documents or 2 documents)"] == [
        "50.00% ± 3.00",
        "25.00% ± 2.50",
        "50.00%",
    ]
    assert rows["a.txt perplexity (5 windows)"] == ["10.00", "12.50", ""]
    assert rows["dog [pictures] top-1 (3 images)"] == ["", "", "10.00%"]


def test_all_numbers_are_saved_unrounded(tmp_path):
    models = {"one": {"a.txt": {"perplexity": 1 / 3, "windows": 2}}}
    Evaluation(models, config={"limit": 2, "path": tmp_path}).save(tmp_path / "results.json")
    written = read_json(tmp_path / "results.json")
    assert written["models"] == models
    assert written["config"] == {"limit": 2, "path": str(tmp_path)}
    assert written["versions"]["torch"] == version("torch")
