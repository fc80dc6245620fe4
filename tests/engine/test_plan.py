"""What is pruned, and to which sparsity, is found once; what cannot be pruned is refused before anything changes."""

import copy

import pytest
import torch
from support.pairwise import spread
from support.refusals import Untouched, refusal
from support.zoo import ZOO

from wanda_lightning import (
    NM,
    OWL,
    AlphaPruning,
    Distil,
    PerLayer,
    PruningConfig,
    Unstructured,
    prune,
)
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.methods import ALLOCATIONS, SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers

EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
UNEQUAL = [name for name in ALLOCATIONS if name != "uniform"]


def test_blocks_do_not_depend_on_where_batches_stop():
    blocks = [
        make_plan(PruningConfig.from_names(sequential=sequential), ZOO["llama"].build()).inventory.blocks
        for sequential in ("block", "layer", "none")
    ]
    assert blocks[0] == blocks[1] == blocks[2]
    assert blocks[0]["model.layers.1.mlp.up_proj"] == "model.layers.1"


@pytest.mark.parametrize(("name", "weighed"), [("llama", True), ("vit", False), ("convnext", False)])
def test_rows_are_weighed_except_in_image_models(name, weighed):
    model, forced = ZOO[name].build(), Unstructured("layer", weigh_rows=True)
    plan = make_plan(PruningConfig.from_names(method="best"), model)
    assert plan.config.pattern == Unstructured("layer", weigh_rows=weighed)
    assert plan.preset == "best"
    assert make_plan(PruningConfig.from_names(method="best", pattern=forced), model).config.pattern == forced


@pytest.mark.parametrize(("name", "blocks"), [("llama", False), ("vit", True), ("convnext", True)])
def test_distil_also_trains_the_blocks_of_image_models(name, blocks):
    model, order = ZOO[name].build(), "none" if blocks else "layer"
    for method in ("best", "thorough"):
        assert make_plan(PruningConfig.from_names(method=method), model).config.sequential == order
    for pattern in ("unstructured", "2:4"):
        plan = make_plan(PruningConfig.from_names(method="thorough", pattern=pattern), model)
        assert (plan.config.recovery, plan.preset) == (Distil(blocks=blocks), "thorough")
    for choices in ({"pattern": "structured"}, {"sequential": "layer"}):
        config = PruningConfig.from_names(method="thorough", **choices)
        assert make_plan(config, model).config.recovery == Distil(blocks=False)


@pytest.mark.parametrize(("name", "stops"), [("llama", "layer"), ("vit", "none")])
def test_whole_units_are_pruned_in_one_pass(name, stops):
    assert make_plan(PruningConfig.from_names(pattern="structured"), ZOO[name].build()).config.sequential == stops


# ---- allocations on whole models


def test_a_given_zero_leaves_a_layer_dense():
    model = ZOO["llama"].build()
    allocation = PerLayer({"model.layers.0.self_attn.q_proj": 0.0})
    report = prune(model, ZOO["llama"].batches(), 0.5, pattern="4:8", allocation=allocation, progress=False)
    assert report.layers[0].sparsity == 0
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert any(note.startswith("mixed N:M: ") and "1 layer dense" in note for note in report.notes)


MODELS = ["llama", "gpt2", "t5", "vit", "convnext", "resnet18", "unreached"]


@pytest.mark.parametrize(("model_name", "name"), spread(MODELS, ["owl", "owl_layer"]))
def test_owl_sees_the_dense_model_at_every_granularity(model_name, name):
    specimen = ZOO[model_name]
    given_out = {}
    for sequential in SEQUENTIAL_CHOICES:
        allocation = OWL(m=2.0, per="layer" if name == "owl_layer" else "block")
        choices = {"allocation": allocation, "sequential": sequential, "progress": False}
        report = prune(specimen.build(), specimen.batches(), 0.5, **choices)
        given_out[sequential] = {layer.name: layer.target for layer in report.layers}
        for layer in report.layers:
            assert layer.sparsity == pytest.approx(layer.target, abs=1e-6)
    assert given_out["block"] == given_out["layer"] == given_out["none"]
    assert len(set(given_out["none"].values())) > 1
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "pattern", "sequential", "criterion"),
    [
        *spread(
            [*UNEQUAL, "uniform"],
            ["unstructured", "unstructured_layer", "4:8", "2:4"],
            SEQUENTIAL_CHOICES,
            ["wanda", "magnitude"],
        ),
        # With other allocations, the search for the share of the scores comes within a thousandth, each time anew.
        ("uniform", "equal_share", "block", "wanda"),
    ],
)
def test_pruning_twice_changes_nothing(name, pattern, sequential, criterion):
    model = ZOO["llama"].build()
    options = {"allocation": name, "pattern": pattern, "sequential": sequential, "criterion": criterion}
    first = prune(model, ZOO["llama"].batches(), 0.5, progress=False, **options)
    once = copy.deepcopy(model.state_dict())
    second = prune(model, ZOO["llama"].batches(), 0.5, progress=False, **options)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())
    assert first.sparsity == second.sparsity


@pytest.mark.parametrize("allocation", [AlphaPruning(), PerLayer({"*.mlp": 0.6}), OWL(m=2.0)], ids=str)
@pytest.mark.parametrize("model_name", ["llama", "vit"])
def test_mixed_n_of_m(model_name, allocation):
    specimen = ZOO[model_name]
    model = specimen.build()
    report = prune(model, specimen.batches(), 0.5, pattern=NM(8, 16), allocation=allocation, progress=False)
    counts = {}
    for layer in find_layers(model).layers:
        kept = (layer.read().reshape(-1, 16) != 0).sum(dim=1).unique().tolist()
        assert len(kept) == 1
        counts[kept[0]] = counts.get(kept[0], 0) + 1
        assert next(pruned for pruned in report.layers if pruned.name == layer.name).sparsity == 1 - kept[0] / 16
    assert len(counts) > 1
    expected = "mixed N:M: " + ", ".join(
        f"{counts[n]} layer{'s' * (counts[n] > 1)} {n}:16" for n in sorted(counts, key=lambda n: f"{n}:16")
    )
    assert expected in report.notes
    largest = max(layer.size for layer in report.layers)
    assert abs(report.sparsity - 0.5) * sum(layer.size for layer in report.layers) <= largest / 16 / 2


@pytest.mark.parametrize(
    "choices",
    [*({"allocation": "owl", "sequential": each} for each in SEQUENTIAL_CHOICES)]
    + [{"recovery": "reconstruct", "sequential": each} for each in ("none", "block")],
    ids=str,
)
def test_batches_are_read_once(choices):
    """A generator is as good as a list, though most of these choices need a pass more."""
    kept = []
    for batches in (ZOO["llama"].batches(), iter(ZOO["llama"].batches())):
        model = ZOO["llama"].build()
        report = prune(model, batches, **choices, progress=False)
        assert report.config["calibration_batches"] == len(ZOO["llama"].batches())
        kept.append(model.state_dict())
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@EVERY_GRANULARITY
@pytest.mark.parametrize(
    ("criterion", "allocation", "passes"),
    [
        ("wanda", "uniform", {"block": 2, "layer": 1, "none": 1}),
        ("wanda", "owl", {"block": 3, "layer": 2, "none": 1}),
        ("magnitude", "owl", dict.fromkeys(SEQUENTIAL_CHOICES, 1)),
    ],
)
def test_how_often_each_layer_runs(criterion, allocation, passes, sequential):
    model, calls = ZOO["llama"].build(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"allocation": allocation, "sequential": sequential, "progress": False}
    prune(model, ZOO["llama"].batches(), criterion=criterion, **options)
    assert len(calls) == passes[sequential] * len(ZOO["llama"].batches())


def test_refusals_come_before_the_batches():
    model = ZOO["llama"].build
    assert "matches no pruned layer" in refusal(model(), Untouched(), allocation=PerLayer({"lm_head": 0.5}))
    assert "with this PerLayer" in refusal(model(), Untouched(), allocation=PerLayer({"*.mlp": 0.9}))
    for sequential in SEQUENTIAL_CHOICES:
        assert "allocation='owl'" in (
            text := refusal(model(), [], criterion="magnitude", allocation="owl", sequential=sequential)
        )
        assert "there is none" in text
