"""What the report tells the user besides the numbers."""

from functools import partial

import pytest
import torch
import yaml
from support import mlps
from support.chains import WIDTH, Chain, EitherWay, Looped, Mlp, vectors
from support.layers import assert_same, rng
from support.quiet import prune
from support.zoo import batches_of, model_of, seeded
from torch import nn

from wanda_lightning.common.wording import quantity
from wanda_lightning.methods import SEQUENTIAL_CHOICES


def coverage_notes(report):
    return [note for note in report.notes if note.startswith("only ")]


# A model, choices, and the end of the note.
COVERED = """
- [llama, {}, null]
- [unreached, {}, 'are blocks.1.up and 1 more, 4,096 weights: no calibration batch called it']
- [torch_transformer, {}, 'and 1 more, 6,144 weights: in_proj_weight of MultiheadAttention is not']
- [torch_transformer, {only: [encoder.layers.0]}, 'encoder.layers.0.self_attn.in_proj_weight, 3,072']
# What the user has left out is no surprise.
- [torch_transformer, {only: ['*.linear1']}, null]
- [torch_transformer, {skip: [encoder.layers.1, '*.in_proj_weight']}, null]
"""


@pytest.mark.parametrize(("name", "choices", "text"), yaml.safe_load(COVERED))
def test_low_coverage_is_said(name, choices, text, caplog):
    report = prune(model_of(name), batches_of(name), **choices)
    notes = coverage_notes(report)
    assert len(notes) == (text is not None)
    for note in notes:
        assert text in note
        assert note in caplog.text
        assert f"Note: {note[:40]}" in str(report)


def uneven():
    """Blocks of a width that 4 does not divide, though it divides what is inside them."""
    return seeded(
        lambda: nn.Sequential(*(mlps.Mlp(width=16, size=6) for _ in range(3)), nn.Linear(6, 40))
    )


MISFITS = ["0.up", "1.up", "2.up", "3"]
SAID = "the pattern does not fit 4 layers, 3 largest (input width 6 is not a multiple of 4): left dense"
ROWS = torch.randn(2, 8, 6, generator=rng(1))


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_what_the_pattern_does_not_fit_stays_dense(sequential, caplog):
    model = uneven()
    other = uneven()
    choices = {"pattern": "2:4", "solver": "sparsegpt", "sequential": sequential}
    report = prune(model, ROWS.split(1), **choices)
    assert [layer.name for layer in report.layers] == ["0.down", "1.down", "2.down"]
    assert [matrix.name for matrix in report.skipped] == MISFITS
    assert {matrix.detail for matrix in report.skipped} == {"input width 6 is not a multiple of 4"}
    assert report.notes == (SAID, *coverage_notes(report))
    # 3 x 96 of 3 x 192 + 240.
    assert coverage_notes(report)[0].startswith("only 35% of the weights")
    assert [record.getMessage() for record in caplog.records] == [*report.notes]
    prune(other, ROWS.split(1), skip=MISFITS, **choices)
    assert_same(model, other)


def test_zeros_from_before_count_toward_the_target():
    model = seeded(lambda: Chain(Mlp(), Mlp()))
    batches = vectors()
    model.blocks[0].up.weight.data[:, :3] = 0
    model.blocks[1].down.weight.data[:, :1] = 0
    for before in ([0.375, 0.0, 0.0, 0.0625], [0.5] * 4):
        report = prune(model, batches, skip=["head"])
        assert [layer.before for layer in report.layers] == before
        assert {layer.sparsity for layer in report.layers} == {0.5}


# ---- layers that a model calls again


def tied():
    model = Looped(times=1)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def shared():
    model = Looped(times=1)
    model.blocks[1].up = model.blocks[0].up
    return model


@pytest.mark.parametrize(
    ("sequential", "noted"), [("block", True), ("layer", True), ("none", False)]
)
@pytest.mark.parametrize(
    ("build", "calls"),
    [(partial(Looped, 3), [3] * 4), (tied, [2, 1, 1]), (shared, [2, 1, 1])],
)
def test_the_report_says_that_the_statistics_are_those_of_the_first_call(
    build, calls, sequential, noted
):
    report = prune(build(), vectors(), sequential=sequential, skip=["head"])
    more = sum(number > 1 for number in calls)
    start = f"the model calls {quantity(more, 'layer')} more than once, or in another order"
    assert sum(note.startswith(start) for note in report.notes) == noted
    if noted:  # only the first call counts
        calls = [1] * len(calls)
    assert [layer.tokens for layer in report.layers] == [21 * number for number in calls]


@pytest.mark.parametrize("skip", [[], ["head"]])
def test_a_loop_through_the_head_is_noted_whether_the_head_is_pruned_or_not(skip):
    class Twice(Chain):
        def forward(self, x):
            return super().forward(x + super().forward(x).mean())

    (note,) = prune(Twice(Mlp(), Mlp()), vectors(), skip=skip).notes
    assert note.startswith(f"the model calls {5 - len(skip)} layers more than once")


def test_batches_in_another_order_are_noted_as_left_out():
    x = torch.ones(2, 3, WIDTH)
    report = prune(EitherWay(Mlp(), Mlp()), [x, -x])
    (note,) = report.notes
    assert note.startswith(
        "the model calls 2 layers more than once, or in another order for some batches, blocks."
    )
    assert [layer.tokens for layer in report.layers] == [6, 6, 12, 12, 12]
