"""Structured zeros fill whole hidden units, in every architecture, and what is no unit of its own stays dense."""

import time
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import reference
from support.disk import same
from support.layers import rng
from support.mlps import MIXING, Mlp
from support.quiet import shrink, zero_units
from support.refusals import refusal
from support.samples import calls_of, drawn, run_of, split
from support.zoo import ZOO, batches_of, cast, causal, matrices, run, seeded
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from wanda_lightning import Fisher
from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.core import Structured
from wanda_lightning.core.allocation import GradientLimit, Uniform, UnitLayer
from wanda_lightning.models import SkipReason
from wanda_lightning.verbs.remove_units import find_what_can_leave

EACH_OF_4 = Structured(multiple_of=4)


def mobile():
    """Inverted residuals with a depthwise convolution and squeeze-and-excitation."""
    squeeze = partial(SqueezeExcite, rd_channels=8)
    blocks = (InvertedResidual(16, 16, exp_ratio=2, se_layer=squeeze) for _ in range(2))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def chain(make):
    """Blocks for vectors, before a head."""
    return seeded(lambda: nn.Sequential(*make(), nn.Linear(32, 10)))


def random(*shape):
    return [torch.randn(shape, generator=rng(seed)) for seed in range(3)]


vectors = partial(random, 4, 32)
OWN = {
    "phi3": (causal("phi3").build, causal("phi3").batches),
    "mobile": (lambda: seeded(mobile), partial(random, 2, 3, 12, 12)),
}


def specimen(name):
    """A model and its batches."""
    make, batches = OWN[name] if name in OWN else (ZOO[name].build, ZOO[name].batches)
    return make(), batches()


prune_units = partial(zero_units, multiple_of=4)


READERS = {
    "llama": {"mlp.down_proj"},
    "phi3": {"mlp.down_proj"},  # gates and values are halves of one matrix
    "gpt2": {"mlp.c_proj"},
    "convnext": {"mlp.fc2"},
    "plain_mlp": {"2", "4"},
    "resnet50": {"conv2", "conv3"},
    "mobile": {"conv_pwl", "se.conv_expand"},
}
"""The layers that read hidden units, by their names inside each block."""


def search(model, batches, **choices):
    """The run after the search for units, and what has found them."""
    return find_what_can_leave(run_of(model, batches, pattern=EACH_OF_4, **choices))


def units_in(model, batches):
    """The hidden units that can be taken out, by their reader."""
    return search(model, batches)[1].units


@pytest.fixture(scope="module", params=READERS)
def pruned(request):
    """A model whose units were pruned, what was found before, and the zero units of each reader."""
    model, batches = specimen(request.param)
    searched, found = search(model, batches)
    report = prune_units(model, batches, refit=False, keep_batch_norm=True)
    return SimpleNamespace(
        name=request.param,
        model=model,
        batches=batches,
        report=report,
        blocks=searched.plan.inventory.blocks,
        units=found.units,
        zero={reader: units.slots[-1].zeros() for reader, units in found.units.items()},
    )


def test_the_layers_that_read_hidden_units_are_found(pruned):
    expected = {
        layer
        for layer, block in pruned.blocks.items()
        if layer.removeprefix(f"{block}.") in READERS[pruned.name]
    }
    assert pruned.units.keys() == expected


def test_half_of_the_units_become_zero(pruned):
    for reader, units in pruned.units.items():
        kept = reference.kept_units(units.width, 0.5, EACH_OF_4.multiple_of)
        assert int(pruned.zero[reader].sum()) == units.width - kept


def test_nothing_but_the_units_changes(pruned):
    expected, batches = specimen(pruned.name)
    for reader, units in units_in(expected, batches).items():
        units.zero(pruned.zero[reader])
    assert same(pruned.model.state_dict(), expected.state_dict())


def test_the_outputs_are_those_of_the_model_without_the_units(pruned):
    smaller = deepcopy(pruned.model)
    for reader, units in units_in(smaller, pruned.batches).items():
        units.take(~pruned.zero[reader])
    outputs, expected = (run(each, pruned.batches[0]) for each in (smaller, pruned.model))
    assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_the_report_has_the_sparsity_of_each_layer(pruned):
    records = {layer.name: layer for layer in pruned.report.layers}
    for name, record in records.items():
        zero = pruned.model.get_submodule(name).weight == 0
        assert record.sparsity == pytest.approx(float(zero.float().mean()), abs=1e-9)
    for reader, units in pruned.units.items():
        number = int(pruned.zero[reader].sum())
        assert f"{number} of {units.width} hidden units removed" in records[reader].note


def test_the_report_lists_all_matrices_and_names_the_number_of_units(pruned):
    report = pruned.report
    listed = [matrix.name for matrix in (*report.layers, *report.skipped)]
    assert sorted(listed) == sorted(matrices(pruned.model))
    number = sum(int(zero.sum()) for zero in pruned.zero.values())
    width = sum(units.width for units in pruned.units.values())
    assert f"{number} of {width} hidden units removed" in report.notes


class TwoReaders(Mlp):
    """Two layers that read the same units."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(64, 32)

    def forward(self, x):
        units = self.up(x)
        return x + self.down(units.relu()) * self.other(units.sigmoid())


def test_units_that_two_layers_read_are_found_once():
    """Otherwise Fisher and the costs would count them twice."""
    model = chain(lambda: [TwoReaders(), TwoReaders()])
    found = units_in(model, vectors())
    assert list(found) == ["0.down", "1.down"]
    assert {slot.module for slot in found["0.down"].slots} == {
        model[0].up,
        model[0].down,
        model[0].other,
    }


class Centered(nn.Module):
    """Subtract a share of the mean over the units, as Gemma 3n's activations do in its first layers only."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return torch.relu(x - self.share * x.mean(-1, keepdim=True))


def mixed(norm, scale):
    return [Mlp(), Mlp(MIXING[norm](64), scale), Mlp(nn.ReLU())]


def tied():
    first = Mlp()
    second = Mlp()
    third = Mlp()
    second.up.weight = first.up.weight
    return [first, second, third]


def twice():
    shared = Mlp()
    return [Mlp(), shared, Mlp(), shared]


@pytest.mark.parametrize(
    ("make", "coupled"),
    [
        *((partial(mixed, norm, scale), [0, 2]) for norm in MIXING for scale in (1.0, 1e-7)),
        (
            lambda: [Mlp(Centered(share)) for share in (0.5, 0.0, 0.5, 0.0)],
            [1, 3],
        ),  # with the same parameters
        (tied, [2]),
        (twice, [0, 2]),
    ],
)
def test_units_that_depend_on_others_stay_dense(make, coupled):
    """Also if a small scale of the branch, or a last layer of zeros, hides the difference in the results."""
    model = chain(make)
    if model[1].scale < 1:
        nn.init.zeros_(model[1].down.weight)
    searched, found = search(model, vectors())
    assert list(found.units) == [f"{index}.down" for index in coupled]
    assert {m.reason for m in searched.plan.inventory.skipped if m.name.endswith("down")} == {
        SkipReason.UNCOUPLED
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["phi3", "mobile"])
def test_other_dtypes(name, dtype):
    model, batches = specimen(name)
    rounded = cast(batches, dtype)
    assert (
        list(units_in(deepcopy(model).to(dtype), rounded)) == list(units_in(model, batches)) != []
    )


@pytest.mark.parametrize(
    ("name", "skip", "stays"),
    [
        *(
            ("llama", f"model.layers.0.mlp.{each}_proj", {"model.layers.0.mlp.down_proj"})
            for each in ("up", "down")
        ),
        ("mobile", "1.conv_dw", {"1.conv_pwl"}),
        *(
            ("mobile", f"1.se.conv_{each}", {"1.conv_pwl", "1.se.conv_expand"})
            for each in ("reduce", "expand")
        ),
    ],
)
def test_a_skipped_layer_among_writers_reader_and_between_leaves_the_units_of_its_block(
    name, skip, stays
):
    model, batches = specimen(name)
    block = model.get_submodule(skip if name == "mobile" else "model.layers.0.mlp")
    dense = deepcopy(block.state_dict())
    found = units_in(model, batches)
    layers = {layer.name for layer in prune_units(model, batches, skip=[skip]).layers}
    assert same(block.state_dict(), dense)
    assert found.keys() & layers == found.keys() - stays


# ---- scores, solvers, allocations


def test_the_units_with_the_smallest_sums_of_squared_scores_become_zero():
    (model, batches), reader = specimen("resnet50"), "layer3.1.conv2"
    module = model.get_submodule(reader)
    calls = calls_of(model, [reader], batches)[reader]
    images = reference.array(torch.cat([x for (x,) in calls]))
    tokens = reference.im2col(images, module.kernel_size, module.stride, module.padding)
    weight = reference.array(module.weight.permute(0, 2, 3, 1).flatten(1))
    expected = reference.keep_units(reference.wanda(weight, tokens), 0.5, 4, columns=9)[
        0, : images.shape[1]
    ]
    prune_units(model, batches, refit=False, sequential="none")
    np.testing.assert_array_equal(
        (module.weight != 0).movedim(1, 0).flatten(1).any(dim=1), expected
    )


def test_fisher_scores_units_by_their_effect_on_the_loss():
    """Against autograd: (x * dL/dx)^2 summed over tokens, with the labels that are drawn in the package."""
    model, batches = specimen("llama")
    held = {}
    own, found = search(model, batches, allocation="fisher")
    expected = dict.fromkeys(found.units, 0.0)

    def keep(reader, module, args):
        held[reader] = args[0]
        args[0].retain_grad()

    hooks = [
        model.get_submodule(reader).register_forward_pre_hook(partial(keep, reader))
        for reader in expected
    ]
    for index, sample in enumerate(split(batches, 1)):
        logits = run(model, sample).flatten(0, -2)
        F.cross_entropy(logits, drawn(logits, index), reduction="sum").backward()
        for reader, x in held.items():
            expected[reader] += (x.detach() * x.grad).flatten(0, -2).square().sum(dim=0)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    with pruning_mode(model):
        got = gradient_statistics(
            model,
            own.plan.layers,
            own.plan.blocks,
            own.samples,
            lambda _: None,
            GradientLimit(),
            found.unit_columns,
        )
    for reader, value in expected.items():
        assert_close(got[reader].units, value, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("zeros", [0, 50])
def test_fisher_meets_the_target_within_one_multiple(sparsity, zeros):
    """Also if many units, such as dead ones, have the same score."""
    scores = torch.rand(4, 96, generator=rng(1)) * torch.tensor([[1], [2], [3], [4]])
    scores[:2, :zeros] = 0
    layers = [UnitLayer(f"layer.{n}", "*", len(each), each) for n, each in enumerate(scores)]
    shares = Fisher().of_units(layers, sparsity, Structured(8)).values()
    removed = [round(share * 96) for share in shares]
    assert all(number % 8 == 0 for number in removed)
    assert int(4 * 96 * sparsity) <= sum(removed) < 4 * 96 * sparsity + 8
    assert max(removed) <= 96 * max(0.6, (1 + sparsity) / 2) + 4


def test_fisher_takes_the_units_with_the_smallest_scores_for_their_costs():
    """One at a time, until they cost a share of all: the plainest way to say it."""
    scores = torch.rand(3, 40, generator=rng(1))
    costs = torch.tensor([0.25, 0.75, 2.0])
    layers = [
        UnitLayer(f"layer.{n}", "*", 40, each, float(costs[n])) for n, each in enumerate(scores)
    ]
    shares = Fisher(cost="seconds").of_units(layers, 0.3, Structured(1)).values()
    got = [round(share * 40) for share in shares]
    expected = [0, 0, 0]
    for index in (scores / costs[:, None]).flatten().argsort():
        if (torch.tensor(expected) * costs).sum() < 36:
            expected[index // 40] += 1
    assert got == expected


def test_a_slow_block_loses_more_units():
    model = chain(lambda: (Mlp(), Mlp(), Mlp()))
    model[1].between.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    report = prune_units(model, vectors(), 0.4, by="seconds")
    zeros = [int((block.down.weight == 0).all(dim=0).sum()) for block in model[:3]]
    assert zeros[1] > max(zeros[0], zeros[2])
    assert report.config["unit_costs"].keys() == {f"{block}.down" for block in range(3)}
    assert any("% of the seconds of all" in note for note in report.notes)


@pytest.mark.parametrize(
    ("widths", "sparsity", "kept"),
    [
        (
            (384, 768, 1536, 3072),
            0.3,
            (272, 544, 1088, 2176),
        ),  # mlp_ratio=4 of ConvNeXt: one ratio, 17 / 24
        ((192, 384, 640, 1216), 0.3, (144, 288, 480, 912)),  # 3 / 4
        (
            (96, 144, 240),
            0.25,
            (72, 112, 176),
        ),  # no ratio near 3 / 4 leaves multiples of 8: each on its own
        ((16, 32, 64), 0.25, (16, 24, 48)),
    ],
)
def test_uniform_gives_one_ratio_to_all_layers_of_a_kind(widths, sparsity, kept):
    layers = [UnitLayer(f"stages.{n}.fc2", "stages.*.fc2", width) for n, width in enumerate(widths)]
    got = Uniform().of_units([*layers, UnitLayer("other", "other", 100)], sparsity, Structured(8))
    assert tuple(Structured(8).kept(layer.width, got[layer.name]) for layer in layers) == kept


# ---- laws


@pytest.mark.parametrize("recovery", ["reconstruct", "distill"])
def test_recoveries_keep_the_units_at_zero(recovery):
    """Otherwise they could not leave."""
    model, batches = specimen("llama")
    shrink(model, batches, units=0.5, recovery=recovery, sequential="block")
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {32}


# ---- the report


def test_a_sparsity_that_rounds_to_no_unit_is_named(caplog):
    report = shrink(*specimen("llama"), units=0.05)
    text = "none of 128 hidden units is removed, because units=0.05 rounds to no unit of any layer"
    assert any(note.startswith(text) for note in report.notes)
    assert text in caplog.text


def test_layers_whose_units_are_never_written_name_their_writers_too():
    """A reader that no token but padding reaches stays dense, and so does what writes its units."""
    model = chain(lambda: [Mlp(nn.ReLU()), Mlp(nn.ReLU())])
    model[0].up.weight.data.zero_()
    model[0].up.bias.data.fill_(-1.0)
    report = prune_units(model, vectors())
    skipped = {matrix.name: matrix.reason for matrix in report.skipped}
    assert skipped["0.up"] == skipped["0.down"] == SkipReason.INACTIVE
    assert {layer.name for layer in report.layers} == {"1.up", "1.down"}


# ---- what is refused, before anything is written


def apart():
    return nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32))


LLAMA = ZOO["llama"].build


@pytest.mark.parametrize(
    ("make", "choices", "text"),
    [
        (
            LLAMA,
            {"multiple_of": 64},
            "multiple_of=64 leaves no unit to remove: the widest layer, model.layers.0.mlp",
        ),
        (
            LLAMA,
            {"units": 0.95},
            "units=0.95 would remove all 64 hidden units: the widest layer, model.layers.0.mlp",
        ),
        (
            LLAMA,
            {"skip": ["*.mlp.*"]},
            "finds no hidden units in the model: in no block does one layer read",
        ),
        (apart, {}, "finds no hidden units"),
    ],
)
def test_what_does_not_fit_is_refused(make, choices, text):
    batches = vectors() if make is apart else batches_of("llama")
    choices = {"units": 0.5, **choices}
    assert text in refusal(make(), batches, verb=shrink, **choices)
