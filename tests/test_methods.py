"""Methods and presets, as the callback and `prune` take them."""

import itertools

import pytest
import torch
from support.callbacks import Net, loader, trainer
from support.zoo import ZOO

from wanda_lightning import PruningCallback, PruningConfig, Unstructured, prune
from wanda_lightning.methods import METHODS, PATTERNS, PRESETS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]
EVERY_PATTERN = ["unstructured", "1:4", *PATTERNS]
# Two patterns for each preset.
SAMPLE = set(zip(itertools.cycle(PRESETS), EVERY_PATTERN, strict=False))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.nightly)
        for case in itertools.product(PRESETS, EVERY_PATTERN)
    ]
    + [(name, "unstructured") for name in METHODS],
)
def test_every_method_prunes_and_every_preset_takes_every_pattern(name, pattern):
    specimen = ZOO["mixtral" if pattern == "experts" else "plain_mlp"]
    sparsity = 0.75 if pattern == "1:4" else 0.5
    report = prune(
        specimen.build(), specimen.batches(), sparsity, method=name, pattern=pattern, progress=False
    )
    # A fraction of the units; a layer between two others has zero rows and zero columns.
    if pattern == "structured":
        assert any(note.startswith("64 of 128 hidden units are zero; ") for note in report.notes)
        return
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)
    if ":" in pattern:
        assert report.config["allocation"] == {"name": "Uniform"}
        assert {layer.target for layer in report.layers} == {sparsity}


# What the reference compares: rows for Wanda, the whole layer for magnitude, a layer's block of columns for SparseGPT.
OF_ROWS = {"wanda", "ria", "ablate_wanda_seq", "refit", "admm", "fast"}


def test_unstructured_means_what_the_method_compares():
    for name in (*METHODS, *PRESETS):
        group = "row" if name in OF_ROWS else "layer"
        weighed = None if name in ("best", "thorough") else False
        assert PruningConfig.from_names(method=name).pattern == Unstructured(
            group, weigh_rows=weighed
        )
        assert PruningConfig.from_names(
            method=name, pattern="unstructured_row"
        ).pattern == Unstructured("row")
        assert PruningConfig.from_names(
            method=name, pattern=Unstructured("layer")
        ).pattern == Unstructured("layer")


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet18"])
def test_the_preset_that_trains_on_images(name):
    """The report says what was done; layers outside of blocks, which downsample, are only distilled."""
    specimen = ZOO[name]
    report = prune(specimen.build(), specimen.batches(), 0.5, method="thorough", progress=False)
    assert (report.config["preset"], report.config["sequential"]) == ("thorough", "none")
    assert "blocks=True" in report.training.recovery
    assert all(
        layer.part
        for layer in report.layers
        if layer.block != layer.name and "downsample" not in layer.name
    )
    assert sum(layer.part is not None for layer in report.layers) > len(report.layers) / 2


@pytest.mark.parametrize("name", ["fast", "balanced"])
def test_mixed_precision_rounds_no_solver(name):
    reports = []
    modules = [Net(), Net()]
    for module, precision in zip(modules, ("32-true", "bf16-mixed"), strict=True):
        # No gradients.
        choices = {
            "allocation": "uniform",
            "pattern": "unstructured_layer",
            "recovery": "none",
        }
        callback = PruningCallback(0.5, method=name, num_samples=8, **choices)
        trainer(callback, precision=precision).validate(module, loader(), verbose=False)
        reports.append(callback.report)
    first, second = (module.layers[0].weight for module in modules)  # its inputs are the same
    assert torch.equal(first, second)
    assert reports[0].sparsity == reports[1].sparsity
