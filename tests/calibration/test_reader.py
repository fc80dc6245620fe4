"""What is read of the inputs: those that are never active, NaN and infinity."""

import math

import pytest
import torch
from support.chains import Chain, Mlp, vectors
from support.pairwise import spread
from support.refusals import refusal
from support.samples import calls_of
from support.zoo import seeded
from torch import nn

from wanda_lightning import NM, OWL, RIA, Unstructured, prune
from wanda_lightning.core.criteria import Saliency
from wanda_lightning.methods import SEQUENTIAL_CHOICES, SOLVERS

# ---- inputs that are never active


DEAD = (0, 1, 6, 9, 14, 15)
"""Inputs of blocks.0.down that are never active."""


def build(dead=DEAD):
    model = seeded(lambda: Chain(Mlp(), Mlp()))
    with torch.no_grad():
        model.blocks[0].up.bias[list(dead)] = -100
        model.blocks[0].down.weight[:, list(dead)] *= 50  # the largest weights, for nothing
    return model


LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
COUNTED = "padding counted: the attention_mask does not show which inputs are padding"


CHOOSERS = {
    "wanda": {},
    "ria": {"criterion": RIA()},
    "saliency": {"criterion": Saliency()},
    "owl": {"allocation": OWL()},
    **{name: {"solver": name} for name in SOLVERS},
}


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", CHOOSERS)
def test_inputs_that_are_never_active_go_first(name, pattern):
    model = build()
    report = prune(model, vectors(), 0.5, pattern=pattern, skip=["head"], **CHOOSERS[name], progress=False)
    kept = model.blocks[0].down.weight != 0
    assert not kept[:, list(DEAD)].any()
    if name != "owl":
        assert kept.float().mean() == 0.5
    assert report.layers[1].note.startswith("6 inputs never active")


def test_inactive_inputs_are_counted_over_all_batches():
    model = build()
    calls = calls_of(model, LAYERS, vectors())
    report = prune(model, vectors(), skip=["head"], sequential="none", progress=False)
    active = {name: torch.stack([(x != 0).any(dim=(0, 1)) for (x,) in each]).any(dim=0) for name, each in calls.items()}
    inactive = {name: int((~each).sum()) for name, each in active.items()}
    assert inactive["blocks.0.down"] == 6
    notes = {name: f"{count} inputs never active" if count else "" for name, count in inactive.items()}
    assert {layer.name: layer.note for layer in report.layers} == notes


class Masked(nn.Module):
    """Computes the tokens from `first` on, whatever the mask says."""

    def __init__(self, first):
        super().__init__()
        self.net, self.first = build(), first

    def forward(self, x, attention_mask):
        return self.net(x[:, self.first :])


def test_a_mask_of_document_numbers_leaves_out_its_zeros():
    mask = torch.tensor([[1, 2, 0], [0, 1, 3]])
    report = prune(Masked(0), [{"x": vectors()[0], "attention_mask": mask}], progress=False)
    assert {layer.tokens for layer in report.layers} == {2 + 2}


def test_notes_of_a_layer_add_up():
    batches = [{"x": x, "attention_mask": torch.ones(x.shape[:2]).tril()} for x in vectors()]
    report = prune(Masked(1), batches, progress=False)
    assert {layer.name: layer.note for layer in report.layers}[
        f"net.{LAYERS[1]}"
    ] == f"6 inputs never active; {COUNTED}"


# ---- layers without active inputs


@pytest.mark.parametrize(("sequential", "solver"), spread(SEQUENTIAL_CHOICES, ["sparsegpt", "zero_out"]))
def test_a_layer_whose_inputs_are_all_zero_stays_dense(sequential, solver, caplog):
    model = build(dead=range(16))
    before = model.blocks[0].down.weight.clone()
    report = prune(model, vectors(), solver=solver, sequential=sequential, skip=["head"], progress=False)
    assert torch.equal(model.blocks[0].down.weight, before)
    assert ("blocks.0.down", "all its inputs were zero") in {(m.name, m.detail) for m in report.skipped}
    note = "all inputs were zero in 1 layer, blocks.0.down first: left dense"
    assert note in report.notes
    assert note in caplog.text
    assert [layer.name for layer in report.layers] == [LAYERS[0], *LAYERS[2:]]
    assert report.parameters == sum(p.numel() for p in model.parameters())


class DeadGroup(nn.Module):
    """The second group of the convolution never sees anything."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x):
        return self.conv(self.first(x) * (torch.arange(8) < 4)[:, None, None])


def test_a_group_whose_inputs_are_all_zero_stays_dense():
    model = DeadGroup()
    report = prune(model, [torch.randn(2, 3, 5, 5)], progress=False)
    assert [layer.name for layer in report.layers] == ["conv.group0"]
    assert {m.name: m.shape for m in report.skipped if "zero" in m.detail} == {"conv.group1": (4, 4, 3, 3)}
    assert model.conv.weight[4:].all()
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.zeros == 4 * 18 == int((model.conv.weight == 0).sum())


# ---- NaN and infinity


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
@pytest.mark.parametrize(
    ("make", "shape", "index"),
    [
        (lambda: nn.Linear(4, 8), (3, 5, 4), (2, 4, 1)),
        (lambda: nn.Linear(4, 8), (15, 4), (10, 3)),
        (lambda: nn.Conv2d(8, 8, (1, 2)), (3, 8, 3, 5), (1, 0, 2, 3)),
    ],
)
@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_nan_and_infinity_are_found(sequential, make, shape, index, value):
    """Also an overflow of the squares."""
    good, bad = torch.randn(2, *shape[1:]), torch.randn(shape)
    bad[index] = value
    found = refusal(nn.Sequential(make()), [good, bad], sequential=sequential)
    assert "the input of 0 holds NaN or infinity, or its squares overflow" in found
    assert "in calibration batch 1 (counted from 0)" in found
