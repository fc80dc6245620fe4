"""What the report tells the user besides the numbers."""

from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from support.pairwise import spread, with_nightly
from support.zoo import ZOO, seeded
from torch import nn

from wanda_lightning import NM, prune
from wanda_lightning.engine.notes import low_coverage
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import SkipReason, find_layers


class Block(nn.Module):
    """A linear layer, and a matrix of no layer, which holds `share` of the weights."""

    def __init__(self, share):
        super().__init__()
        self.up, self.down = nn.Linear(10, 10), nn.Linear(10, 10)
        self.mix = nn.Parameter(torch.randn(round(200 * share / (1 - share)) // 10, 10))

    def forward(self, x):
        return x + self.down(F.relu(self.up(x))) + F.linear(x, self.mix).sum()


class Net(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.embed = nn.Embedding(500, 10)
        self.blocks = nn.ModuleList([Block(share), Block(share)])
        self.head = nn.Linear(10, 400, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(share=0.0):
    return seeded(lambda: Net(share))


IDS = torch.arange(60).reshape(3, 20)


def coverage_notes(report):
    return [note for note in report.notes if note.startswith("only ")]


@pytest.mark.parametrize(("share", "percent"), [(0.1, None), (0.2, None), (1 / 3, 67), (0.9, 10)])
def test_low_coverage_is_said(share, percent, caplog):
    report = prune(build(share), [IDS], progress=False)
    mix = build(share).blocks[0].mix.numel()
    if percent is None:
        assert coverage_notes(report) == []
        return
    (note,) = coverage_notes(report)
    assert note == (
        f"only {percent}% of the weights besides embeddings, stem and head are in pruned layers; the largest parts "
        f"left out are blocks.0.mix and 1 more, {2 * mix:,} weights: mix of Block is not the weight of a supported "
        "layer (Linear, Conv1D, Conv1d, Conv2d, Conv2dSame)"
    )
    assert note in caplog.text
    assert f"Note: {note[:40]}" in str(report)


def test_what_the_user_left_out_is_no_surprise():
    for choices in ({"skip": ["blocks.1", "*.mix"]}, {"only": ["*.up"]}, {"only": ["blocks.0"], "skip": ["*.mix"]}):
        assert coverage_notes(prune(build(0.9), [IDS], **choices, progress=False)) == []
    (note,) = coverage_notes(prune(build(0.9), [IDS], only=["blocks.0"], progress=False))
    assert "the largest parts left out are blocks.0.mix, 1,800 weights" in note


def test_what_no_batch_reached_is_left_out_too():
    class Half(Net):
        def forward(self, ids):
            return self.head(self.blocks[0](self.embed(ids)))

    (note,) = coverage_notes(prune(Half(0.0), [IDS], progress=False))
    assert note.startswith("only 50% ")
    assert "blocks.1.up and 1 more, 200 weights: no calibration batch called it" in note


class Uneven(nn.Module):
    """Blocks of a width that 4 does not divide, though it divides what is inside them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x):
            return x + self.down(F.relu(self.up(x)))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.last = nn.Linear(6, 40)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


MISFITS = ["blocks.0.up", "blocks.1.up", "blocks.2.up", "last"]


SAID = "the pattern does not fit 4 layers, last largest (input width 6 is not a multiple of 4): left dense"


def rows():
    return list(torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("sequential", "solver"), spread(SEQUENTIAL_CHOICES, ["zero_out", "sparsegpt"]))
def test_what_the_pattern_does_not_fit_stays_dense(sequential, solver, caplog):
    model, other = seeded(Uneven), seeded(Uneven)
    choices = {"solver": solver, "sequential": sequential, "progress": False}
    report = prune(model, rows(), pattern="2:4", **choices)
    assert [layer.name for layer in report.layers] == ["blocks.0.down", "blocks.1.down", "blocks.2.down"]
    assert all(layer.sparsity == 0.5 for layer in report.layers)
    assert [(matrix.name, matrix.shape) for matrix in report.skipped] == [(name, (16, 6)) for name in MISFITS[:3]] + [
        ("last", (40, 6))
    ]
    assert {matrix.detail for matrix in report.skipped} == {"input width 6 is not a multiple of 4"}
    assert report.notes == [SAID, *coverage_notes(report)]
    assert coverage_notes(report)[0].startswith("only 35% of the weights")  # 3 x 96 of 3 x 192 + 240
    assert [record.getMessage() for record in caplog.records] == report.notes
    prune(other, rows(), pattern="2:4", skip=MISFITS, **choices)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        if name.removesuffix(".weight") in MISFITS:
            assert torch.equal(parameter, seeded(Uneven).get_parameter(name)), name


@pytest.mark.parametrize(
    ("name", "m"),
    with_nightly(
        zip(("llama", "gpt_oss", "t5", "convnext", "resnet50", "expert_list", "routed"), cycle([16, 48])),
        product(sorted(ZOO.keys() - {"torch_transformer"}), [16, 48]),
    ),
)
def test_units_do_not_depend_on_what_fits(name, m):
    model = ZOO[name].build()
    assert low_coverage(find_layers(model)) is None
    for sequential in SEQUENTIAL_CHOICES:
        every = find_layers(model, sequential)
        found = find_layers(model, sequential, pattern=NM(1, m))
        fitting = [[layer.name for layer in unit.layers if layer.shape[1] % m == 0] for unit in every.units]
        assert [[layer.name for layer in unit.layers] for unit in found.units] == [names for names in fitting if names]
        assert {unit.name for unit in found.units} <= {unit.name for unit in every.units}
        misfits = [layer.name for layer in every.layers if layer.shape[1] % m]
        assert [matrix.name for matrix in found.skipped if matrix.reason is SkipReason.PATTERN] == misfits
        assert found.skipped[: len(every.skipped)] == every.skipped


def test_a_model_that_is_sparse_already_says_so():
    model = build()
    with torch.no_grad():
        model.blocks[0].up.weight[:, :3] = 0
        model.blocks[1].up.weight[:, :1] = 0
        model.blocks[1].down.weight[0, :5] = 0  # 5 of 100
    report = prune(model, [IDS], progress=False)
    assert [layer.before for layer in report.layers] == [0.3, 0.0, 0.1, 0.05]
    said = "2 layers were sparse already, blocks.0.up most: 30.0% zeros, which count toward the target"
    assert said in report.notes
    assert {layer.sparsity for layer in report.layers} == {0.5}
    again = prune(model, [IDS], progress=False)
    assert "4 layers were sparse already, blocks.0.up most: 50.0% zeros, which count toward the target" in again.notes
    assert not any("already" in note for note in prune(build(), [IDS], progress=False).notes)
