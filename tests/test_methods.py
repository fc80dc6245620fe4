"""Methods and presets, as the callback and `prune` take them."""

from dataclasses import dataclass

import pytest
import torch
from support.callbacks import WITHOUT_ADVICE, Net, validate_module
from support.pairwise import spread
from support.quiet import prune
from support.refusals import refuses
from support.zoo import ZOO

from wanda_lightning import PruningCallback, PruningConfig, register
from wanda_lightning.core import Criterion, Unstructured
from wanda_lightning.methods import CRITERIA, METHODS, PATTERNS, PRESETS

pytestmark = WITHOUT_ADVICE
EVERY_PATTERN = ["unstructured", "1:4", *PATTERNS]


def pruned(name, method, pattern, sparsity=0.5):
    specimen = ZOO[name]
    return prune(
        specimen.build(),
        specimen.batches(),
        sparsity,
        method=method,
        pattern=pattern,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes(method):
    report = pruned("plain_mlp", method, "unstructured")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


# Two patterns for each preset; all others run at night.
@pytest.mark.parametrize(("method", "pattern"), spread(PRESETS, EVERY_PATTERN))
def test_every_preset_takes_every_pattern(method, pattern):
    sparsity = 0.75 if pattern == "1:4" else 0.5
    report = pruned("plain_mlp", method, pattern, sparsity)
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)
    if ":" in pattern:
        assert report.config["allocation"] == {"name": "Uniform"}
        assert {layer.target for layer in report.layers} == {sparsity}


# What the reference compares: rows for Wanda, the whole layer for magnitude, a layer's block of columns for SparseGPT.
OF_ROWS = {"wanda", "ria", "ablate_wanda_seq", "refit", "admm", "fast"}
WEIGHED = {"best", "thorough"}
EVERY_NAME = pytest.mark.parametrize("name", [*METHODS, *PRESETS])


@EVERY_NAME
def test_unstructured_means_what_the_method_compares(name):
    group = "row" if name in OF_ROWS else "layer"
    weigh_rows = None if name in WEIGHED else False
    config = PruningConfig(method=name)
    assert config.pattern == Unstructured(group, weigh_rows=weigh_rows)


@EVERY_NAME
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("unstructured_row", Unstructured("row")),
        (Unstructured("layer"), Unstructured("layer")),
    ],
)
def test_any_method_compares_what_the_user_chooses(name, pattern, expected):
    config = PruningConfig(method=name, pattern=pattern)
    assert config.pattern == expected


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet18"])
def test_the_preset_that_trains_on_images(name):
    """The report says what was done; layers outside of blocks, which downsample, are only distilled."""
    report = pruned(name, "thorough", "unstructured")
    assert report.config["preset"] == "thorough"
    assert report.config["sequential"] == "none"
    assert "blocks=True" in report.training.recovery
    trained = [layer for layer in report.layers if layer.part]
    for layer in report.layers:
        if layer.block != layer.name and "downsample" not in layer.name:
            assert layer in trained
    assert len(trained) > len(report.layers) / 2


@pytest.mark.parametrize("name", ["fast", "balanced"])
def test_mixed_precision_rounds_no_solver(name):
    # Choices that need no gradients.
    choices = {"allocation": "uniform", "pattern": "unstructured_layer", "recovery": "none"}
    weights = []
    sparsities = []
    for precision in ("32-true", "bf16-mixed"):
        module = Net()
        callback = PruningCallback(0.5, method=name, num_samples=8, **choices)
        validate_module(module, callback, precision=precision)
        weights.append(module.layers[0].weight)  # the first layer, because its inputs are the same
        sparsities.append(callback.report.sparsity)
    assert torch.equal(*weights)
    assert sparsities[0] == sparsities[1]


def test_a_class_of_ones_own_gets_a_name(monkeypatch):
    for table in (CRITERIA, METHODS):  # which lose the name afterwards
        monkeypatch.setitem(table, "power", None)
        monkeypatch.delitem(table, "power")

    @dataclass(frozen=True)
    class Power(Criterion):
        needs = frozenset({"square_sum"})
        power: float = 0.5

        def __call__(self, weight, inputs):
            return weight.float().abs() * inputs.norm() ** self.power

    for _ in range(2):  # as in a cell that runs twice
        register("power")(Power)
    for choices in ({"method": "power"}, {"criterion": "power"}):
        assert PruningConfig(0.5, **choices).criterion == Power()
    assert pruned("plain_mlp", "power", "2:4").config["criterion"] == {
        "name": "Power",
        "power": 0.5,
    }

    with refuses("'wanda' is a name of this package. Give Power another one"):
        register("wanda")(Power)
    with refuses(r"register\('net'\) takes a subclass of Criterion, Solver.*, but Net is none"):
        register("net")(Net)
