"""What is pruned, and to which sparsity, is found once; what cannot be pruned is refused before anything changes."""

import copy
from collections import Counter

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
    Fisher,
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


FORCED = Unstructured("layer", weigh_rows=True)
IMAGES, TEXT, EACH = ("vit", "convnext"), ("llama",), ("vit", "convnext", "llama")
RESOLVED = [
    *(
        (names, {"method": "best"}, "pattern", Unstructured("layer", weigh_rows=names is TEXT))
        for names in (TEXT, IMAGES)
    ),
    (EACH, {"method": "best", "pattern": FORCED}, "pattern", FORCED),
    *((TEXT, {"method": method}, "sequential", "layer") for method in ("best", "thorough")),
    *((IMAGES, {"method": method}, "sequential", "none") for method in ("best", "thorough")),
    *((TEXT, {"method": "thorough", "pattern": p}, "recovery", Distil(blocks=False)) for p in ("unstructured", "2:4")),
    *((IMAGES, {"method": "thorough", "pattern": p}, "recovery", Distil(blocks=True)) for p in ("unstructured", "2:4")),
    (EACH, {"method": "thorough", "pattern": "structured"}, "recovery", Distil(blocks=False)),
    (EACH, {"method": "thorough", "sequential": "layer"}, "recovery", Distil(blocks=False)),
    (TEXT, {"pattern": "structured"}, "sequential", "layer"),
    (IMAGES, {"pattern": "structured"}, "sequential", "none"),
]


@pytest.mark.parametrize(("names", "choices", "option", "expected"), RESOLVED)
def test_choices_that_depend_on_the_model(names, choices, option, expected):
    """Rows are weighed except in image models, whose blocks Distil also trains, and which are pruned in one pass."""
    for name in names:
        plan = make_plan(PruningConfig.from_names(**choices), ZOO[name].build())
        assert getattr(plan.config, option) == expected
        assert plan.preset == choices.get("method") or choices.keys() != {"method"}


# ---- allocations on whole models


MODELS = ["llama", "gpt2", "t5", "vit", "convnext", "resnet18", "unreached"]
SPREADING = {"owl": OWL(m=2.0), "owl_layer": OWL(m=2.0, per="layer"), "fisher": Fisher()}


@pytest.mark.parametrize(("model_name", "name"), spread(MODELS, SPREADING))
def test_an_allocation_sees_the_dense_model_at_every_granularity(model_name, name):
    specimen, given_out = ZOO[model_name], []
    for sequential in SEQUENTIAL_CHOICES:
        choices = {"allocation": SPREADING[name], "sequential": sequential, "progress": False}
        report = prune(specimen.build(), specimen.batches(), 0.5, **choices)
        given_out.append({layer.name: layer.target for layer in report.layers})
        for layer in report.layers:
            assert layer.sparsity == pytest.approx(layer.target, abs=1e-6)
    assert given_out[0] == given_out[1] == given_out[2]
    assert len(set(given_out[0].values())) > 1
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


@pytest.mark.parametrize(
    "allocation", [AlphaPruning(), PerLayer({"*.mlp": 0.6}), PerLayer({"*.0.*q*": 0.0}), OWL(m=2.0)], ids=str
)
@pytest.mark.parametrize("model_name", ["llama", "vit"])
def test_mixed_n_of_m(model_name, allocation):
    specimen = ZOO[model_name]
    model = specimen.build()
    report = prune(model, specimen.batches(), 0.5, pattern=NM(8, 16), allocation=allocation, progress=False)
    sparsities, kinds = {layer.name: layer.sparsity for layer in report.layers}, Counter()
    for layer in find_layers(model).layers:
        (kept,) = (layer.read().reshape(-1, 16) != 0).sum(dim=1).unique().tolist()
        kinds["dense" if kept == 16 else f"{kept}:16"] += 1
        assert sparsities[layer.name] == 1 - kept / 16
    assert len(kinds) > 1
    listed = (f"{number} layer{'s' * (number > 1)} {kind}" for kind, number in sorted(kinds.items()))
    assert f"mixed N:M: {', '.join(listed)}" in report.notes
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


@EVERY_GRANULARITY
@pytest.mark.parametrize(
    ("allocation", "message"),
    [(PerLayer({"lm_head": 0.5}), "matches no pruned layer"), (PerLayer({"*.mlp": 0.9}), "with this PerLayer")],
)
def test_refusals_come_before_the_batches(allocation, message, sequential):
    assert message in refusal(ZOO["llama"].build(), Untouched(), allocation=allocation, sequential=sequential)
