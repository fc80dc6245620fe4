"""Statistics of the layers of a stop: what they are of, and inputs that are never active."""

import weakref
from functools import partial

import pytest
import torch
from support.chains import Chain, Mlp, travel, vectors
from support.layers import assert_same
from support.pairwise import spread, with_nightly
from support.quiet import prune
from support.samples import run_of
from support.zoo import ZOO, batches_of, model_of, seeded
from torch import nn
from torch.testing import assert_close

from wanda_lightning import NM, OWL
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.core import RIA, Unstructured
from wanda_lightning.core.criteria import Saliency
from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.methods import SEQUENTIAL_CHOICES, SOLVERS
from wanda_lightning.models import find_layers

NEEDS = frozenset(SUMS)


@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_statistics_are_freed_before_those_of_the_next_unit(sequential, monkeypatch):
    """The inputs of a layer are compared with those of the last one, whose Gram matrix may be large."""
    alive = weakref.WeakSet()
    held = []
    update = InputStatistics.update
    monkeypatch.setattr(
        InputStatistics, "update", lambda *args: held.append(len(alive)) or update(*args)
    )
    model = nn.Sequential(nn.Linear(8, 8), Mlp(), nn.Linear(8, 8), Mlp())
    observer = Observer(NEEDS)
    stops = find_layers(model, sequential).stops
    assert len(stops) == (4 if sequential == "block" else 6)
    for index, calls in travel(model, vectors(1), [stop.module for stop in stops]):
        alive.update(observer(stops[index], calls).inputs.values())
    assert held == [0] * 6


SAMPLED = [
    "llama_padded",
    "gpt_oss",
    "t5",
    "vit",
    "convnext",
    "block_twice",
    "tied",
    "routed",
    "expert_list",
    "plain_mlp",
    "inplace",
    "torch_transformer",
]


@pytest.mark.parametrize("name", with_nightly(SAMPLED, ZOO))
def test_the_dense_model_side_by_side_has_the_sums_of_one_batch_after_another(name):
    model = model_of(name)
    observer = Observer(NEEDS)
    own = run_of(model, batches_of(name))
    with pruning_mode(model):
        expected = observer.whole_model(own.plan.whole_model, own.samples, lambda: None).inputs
        for visit in lockstep(own.plan.blocks_and_layers, own.samples.in_memory(), to_end=True):
            visit.continue_by(partial(observer.watched, visit.stop))
        found = observer.finish(own.plan.whole_model).inputs
    assert found.keys() == expected.keys()
    # Visits to one block are added in another order.
    tolerance = 1e-4 if name in ("block_twice", "tied") else 0
    for layer, statistics in expected.items():
        assert found[layer].count == statistics.count
        assert_close(found[layer].sums, statistics.sums, rtol=tolerance, atol=tolerance)


class Scaled(nn.Module):
    """Two layers that read one tensor, which is scaled in between."""

    def __init__(self, in_place):
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.after = nn.Linear(8, 8)
        self.scale = torch.arange(8.0)
        self.in_place = in_place

    def forward(self, x):
        x = x.relu()
        first = self.before(x)
        x = x.mul_(self.scale) if self.in_place else x * self.scale
        return first + self.after(x)


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_a_tensor_that_the_model_changes_between_two_layers_is_two_inputs(sequential):
    models = [
        seeded(lambda in_place=in_place: Chain(Scaled(in_place), Scaled(in_place)))
        for in_place in (True, False)
    ]
    for model in models:
        prune(model, vectors(), sequential=sequential)
    assert_same(*models)


@torch.inference_mode()
def test_a_tensor_of_inference_mode_is_a_new_input_in_each_layer():
    """No version shows whether such a tensor was changed."""
    found = []
    for in_place in (True, False):
        model = seeded(lambda in_place=in_place: Chain(Scaled(in_place)))
        observer = Observer(NEEDS)
        own = run_of(model, vectors(1))
        (sample,) = own.samples.in_memory()
        with observer.collect(own.plan.whole_model, sample):
            model(vectors(1)[0])
        found.append(
            {name: each.sums for name, each in observer.finish(own.plan.whole_model).inputs.items()}
        )
    assert_same(*found)


# ---- inputs that are never active

DEAD = (0, 1, 6, 9, 14, 15)  # inputs of blocks.0.down


def build(dead=DEAD):
    model = seeded(lambda: Chain(Mlp(), Mlp()))
    model.blocks[0].up.bias.data[list(dead)] = -100
    model.blocks[0].down.weight.data[:, list(dead)] *= 50  # the largest weights, for nothing
    return model


LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
COUNTED = "padding counted: the attention_mask does not show which inputs are padding"


CHOOSERS = {
    "wanda": {},
    "ria": {"criterion": RIA()},
    "saliency": {"criterion": Saliency()},
    "owl": {"allocation": OWL()},
} | {name: {"solver": name} for name in SOLVERS}


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", CHOOSERS)
def test_inputs_that_are_never_active_go_first(name, pattern):
    model = build()
    report = prune(model, vectors(), 0.5, pattern=pattern, skip=["head"], **CHOOSERS[name])
    kept = model.blocks[0].down.weight != 0
    assert not kept[:, list(DEAD)].any()
    if name != "owl":
        assert kept.float().mean() == 0.5
    assert report.layers[1].note.startswith("6 inputs never active")


@pytest.mark.parametrize(
    ("first", "mask", "tokens", "note"),
    [
        (0, torch.tensor([[1, 2, 0], [0, 1, 3]]), 2 + 2, ""),  # numbers of documents
        (1, torch.ones(2, 3).tril(), 2 * 2, f"; {COUNTED}"),  # and the notes of a layer add up
    ],
)
def test_a_mask_leaves_out_its_zeros_where_it_fits(first, mask, tokens, note):
    model = build()
    batch = {"x": vectors()[0], "attention_mask": mask}
    report = prune(model, [batch], forward=lambda batch: model(batch["x"][:, first:]))
    assert {layer.tokens for layer in report.layers} == {tokens}
    assert report.layers[1].note.endswith(f" inputs never active{note}")


# ---- layers without active inputs


@pytest.mark.parametrize(
    ("sequential", "solver"), spread(SEQUENTIAL_CHOICES, ["sparsegpt", "zero_out"])
)
def test_a_layer_whose_inputs_are_all_zero_stays_dense(sequential, solver, caplog):
    model = build(dead=range(16))
    before = model.blocks[0].down.weight.clone()
    report = prune(model, vectors(), solver=solver, sequential=sequential, skip=["head"])
    assert torch.equal(model.blocks[0].down.weight, before)
    assert ("blocks.0.down", "all its inputs were zero") in {
        (m.name, m.detail) for m in report.skipped
    }
    note = "all inputs were zero in 1 layer, blocks.0.down first: left dense"
    assert note in report.notes
    assert note in caplog.text
    assert [layer.name for layer in report.layers] == [LAYERS[0], *LAYERS[2:]]


def test_a_group_whose_inputs_are_all_zero_stays_dense():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2))
    for parameter in model[0].parameters():
        parameter.data[4:] = 0
    report = prune(model, [torch.randn(2, 3, 5, 5)])
    assert [layer.name for layer in report.layers] == ["1.group0"]
    assert {m.name: m.shape for m in report.skipped if "zero" in m.detail} == {
        "1.group1": (4, 4, 3, 3)
    }
    assert model[1].weight[4:].all()
    assert report.layers[0].zeros == 4 * 18 == int((model[1].weight == 0).sum())
