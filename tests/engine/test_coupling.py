"""Structured zeros fill whole hidden units, in every architecture, and what is no unit of its own stays dense."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from support import reference
from support.batches import split
from support.gradients import drawn
from support.mlps import MIXING, Mlp
from support.refusals import refusal
from support.samples import calls_of
from support.tiny import tiny
from support.zoo import ZOO, run, seeded
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import nn
from torch.nn import functional as F

from wanda_lightning import Fisher, PruningConfig, Refit, Structured, prune
from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.samples import Samples, map_tensors
from wanda_lightning.core.allocation import Uniform, UnitLayer
from wanda_lightning.engine.coupling import couple
from wanda_lightning.engine.notes import cost_without
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.engine.run import Run, WeightStore
from wanda_lightning.models import SkipReason
from wanda_lightning.parallel import SINGLE_PROCESS

EACH_OF_4 = Structured(multiple_of=4)


class Blocks(nn.Module):
    """A stem, blocks and a head, for images or vectors."""

    def __init__(self, *blocks, stem=None, width=32):
        super().__init__()
        self.stem = stem or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)) if x.ndim == 4 else x)


class Interleaved(nn.Module):
    """A gate whose rows alternate with those of the values."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        gate, value = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return x + self.down(gate.sigmoid() * value)


def phi3():
    return hf.Phi3ForCausalLM(tiny(hf.Phi3Config))


def mobile():
    """Inverted residuals with a depthwise convolution and squeeze-and-excitation."""
    squeeze = partial(SqueezeExcite, rd_channels=8)
    blocks = (InvertedResidual(16, 16, exp_ratio=2, se_layer=squeeze) for _ in range(2))
    return Blocks(*blocks, stem=nn.Conv2d(3, 16, 3), width=16)


def random(*shape):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def vectors():
    return random(4, 32)


OWN = {
    "phi3": (phi3, ZOO["llama"].batches),
    "mobile": (mobile, lambda: random(2, 3, 12, 12)),
    "interleaved": (lambda: Blocks(Interleaved(), Interleaved()), vectors),
}


def specimen(name):
    """A model and its batches."""
    if name in OWN:
        make, batches = OWN[name]
        return seeded(make), batches()
    return ZOO[name].build(), ZOO[name].batches()


def prune_units(model, batches, **choices):
    return prune(model, batches, 0.5, progress=False, **{"pattern": EACH_OF_4, **choices})


def norm(name):
    return [(f"{name}.{tensor}", 0) for tensor in ("weight", "bias", "running_mean", "running_var")]


# By the reader of one block: every tensor of the block with entries of its units, as (name, dimension, copies).
SLOTS = {
    "llama": {
        "model.layers.1.mlp.down_proj": [("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)]
    },
    "phi3": {"model.layers.1.mlp.down_proj": [("gate_up_proj.weight", 0, "halves"), ("down_proj.weight", 1)]},
    "gpt2": {"transformer.h.1.mlp.c_proj": [("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0)]},
    "vit": {"blocks.0.mlp.fc2": [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)]},
    "convnext": {"stages.1.blocks.0.mlp.fc2": [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)]},
    "interleaved": {"blocks.1.down": [("up.weight", 0, "pairs"), ("up.bias", 0, "pairs"), ("down.weight", 1)]},
    "plain_mlp": {
        "2": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)],
        "4": [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)],
    },
    "resnet18": {
        "layer2.0.conv2": [("conv1.weight", 0), *norm("bn1"), ("conv2.weight", 1)],
    },
    "resnet50": {
        "layer3.1.conv2": [("conv1.weight", 0), *norm("bn1"), ("conv2.weight", 1)],
        "layer3.1.conv3": [("conv2.weight", 0), *norm("bn2"), ("conv3.weight", 1)],
    },
    "mobile": {
        "blocks.1.conv_pwl": [
            ("conv_pw.weight", 0),
            *norm("bn1"),
            *norm("bn2"),
            ("conv_dw.weight", 0),
            ("se.conv_reduce.weight", 1),
            ("se.conv_expand.weight", 0),
            ("se.conv_expand.bias", 0),
            ("conv_pwl.weight", 1),
        ],
        "blocks.1.se.conv_expand": [("conv_reduce.weight", 0), ("conv_reduce.bias", 0), ("conv_expand.weight", 1)],
    },
}


def coupled_run(model, batches, **choices):
    """A run after the search for units."""
    plan = make_plan(PruningConfig.from_names(0.5, pattern=EACH_OF_4, **choices), model)
    samples = Samples(model, batches, lambda batch: run(model, batch), None, SINGLE_PROCESS, "the test")
    own = Run(plan, samples, WeightStore())
    with pruning_mode(model):
        couple(own)
    return own


def found_in(model, batches):
    """The plan after the search for units."""
    return coupled_run(model, batches).plan


def entries(units, copies=None):
    if copies == "halves":
        return torch.cat([units, units])
    return units.repeat_interleave(2) if copies == "pairs" else units


def place(reader, name):
    """The full name of a tensor near a reader."""
    return f"{reader.rpartition('.')[0]}.{name}".lstrip(".")


@pytest.mark.parametrize("name", SLOTS)
def test_the_units_of_each_architecture(name):
    """They are those that are listed, and setting them to zero is the same as taking them out."""
    model, batches = specimen(name)
    names = {tensor: key for key, tensor in model.state_dict(keep_vars=True).items()}
    plan = found_in(model, batches)
    for reader, expected in SLOTS[name].items():
        own = [(names[slot.tensor], slot.dim) for slot in plan.coupled[reader].slots]
        assert sorted(own) == sorted((place(reader, tensor), dim) for tensor, dim, *_ in expected)
    alike = {reader.translate(str.maketrans("", "", "0123456789")) for reader in SLOTS[name]}
    assert {reader.translate(str.maketrans("", "", "0123456789")) for reader in plan.coupled} >= alike
    dense = run(model, batches[0]).detach()
    for units in plan.coupled.values():
        units.zero(torch.arange(units.width) % 3 == 1)
    zero = run(model, batches[0]).detach()
    assert not torch.allclose(zero, dense, atol=1e-3)
    for units in plan.coupled.values():
        assert torch.equal(units.slots[-1].zeros(), torch.arange(units.width) % 3 == 1)
        units.take(~units.slots[-1].zeros())
    torch.testing.assert_close(run(model, batches[0]).detach(), zero, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SLOTS)
def test_zeros_fill_the_units_and_nothing_else_changes(name):
    (model, batches), solver = specimen(name), Refit(intercept=False)  # biases stay
    dense = copy.deepcopy(model.state_dict())
    report = prune_units(model, batches, solver=solver, keep_batch_norm=True)
    pruned, records = model.state_dict(), {layer.name: layer for layer in report.layers}
    every = [place(reader, tensor) for reader, slots in SLOTS[name].items() for tensor, *_ in slots]
    for reader, slots in SLOTS[name].items():
        *_, (last, dim, *_) = slots
        units = (pruned[place(reader, last)].movedim(dim, 0).flatten(1) == 0).all(dim=1)
        assert int(units.sum()) == len(units) - reference.kept_units(len(units), 0.5, 4)
        assert records[reader].target == pytest.approx(float(units.float().mean()))
        assert f"{int(units.sum())} of {len(units)} hidden units are zero" in records[reader].note
        for tensor, dim, *copies in slots:
            key, where = place(reader, tensor), entries(units, *copies)
            rows, before = (state[key].movedim(dim, 0).reshape(len(where), -1) for state in (pruned, dense))
            if "running" in tensor:  # a statistic does not count: the unit's own weight and bias are zero
                assert torch.equal(rows, before)
            else:
                assert (rows[where] == 0).all()
            if key != place(reader, last) and every.count(key) == 1:
                assert torch.equal(rows[~where], before[~where])
    modules = {key.rpartition(".")[0] for key in pruned if not torch.equal(pruned[key], dense[key])}
    assert records.keys() <= modules
    assert all(isinstance(model.get_submodule(key), nn.BatchNorm2d | nn.Conv2d) for key in modules - records.keys())
    for layer in report.layers:
        zero = model.get_submodule(layer.name).weight == 0
        assert layer.sparsity == pytest.approx(float(zero.float().mean()), abs=1e-9)
    found = [matrix.name for matrix in (*report.layers, *report.skipped)]
    parameters = model.named_parameters(remove_duplicate=False)
    assert sorted(found) == sorted(key.removesuffix(".weight") for key, p in parameters if p.ndim > 1)


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("norm", [*MIXING, "mixed"])
def test_units_that_depend_on_each_other_stay_dense(norm, scale):
    """Also if a small scale of the branch, or a last layer of zeros, hides the difference in the results."""
    between = nn.Linear(64, 64) if norm == "mixed" else MIXING[norm](64)
    model = seeded(lambda: Blocks(Mlp(), Mlp(between, scale), Mlp(nn.ReLU())))
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(scale == 1)
    report = prune_units(model, vectors())
    skipped = {matrix.name: matrix for matrix in report.skipped}
    inner = {"blocks.1.down"} if norm == "mixed" else {"blocks.1.up", "blocks.1.down"}
    if norm != "mixed":
        assert inner <= skipped.keys()
        assert {skipped[each].reason for each in inner} == {SkipReason.UNCOUPLED}
        assert "no hidden units that could be taken out" in skipped["blocks.1.up"].detail
    assert {"blocks.0.down", "blocks.2.down", "blocks.0.up"} <= {layer.name for layer in report.layers}


class Centered(nn.Module):
    """Subtract a share of the mean over the units, as Gemma 3n's activations do in its first layers only."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return torch.relu(x - self.share * x.mean(-1, keepdim=True))


def test_blocks_with_the_same_parameters_and_other_attributes_are_tried_again():
    model = seeded(lambda: Blocks(*(Mlp(Centered(share)) for share in (0.5, 0.0, 0.5, 0.0))))
    assert list(found_in(model, vectors()).coupled) == ["blocks.1.down", "blocks.3.down"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "resnet50", "mobile"])
def test_other_dtypes(name, dtype):
    model, batches = specimen(name)
    given = map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, batches)
    assert list(found_in(copy.deepcopy(model).to(dtype), given).coupled) == list(found_in(model, batches).coupled)


@pytest.mark.parametrize(
    ("name", "skip", "block"),
    [
        *(("llama", f"model.layers.0.mlp.{each}_proj", "model.layers.0.mlp") for each in ("up", "down")),
        *(
            ("mobile", f"blocks.0.{each}", f"blocks.0.{each}")
            for each in ("se.conv_reduce", "conv_dw", "se.conv_expand")
        ),
    ],
)
def test_a_skipped_layer_among_writers_reader_and_between_leaves_the_units_of_its_block(name, skip, block):
    model, batches = specimen(name)
    dense = copy.deepcopy(model.get_submodule(block).state_dict())
    report = prune_units(model, batches, skip=[skip])
    own, layers = model.get_submodule(block).state_dict(), {layer.name for layer in report.layers}
    assert all(torch.equal(own[key], dense[key]) for key in dense)
    if name == "llama":
        assert layers == {f"model.layers.1.mlp.{each}_proj" for each in ("gate", "up", "down")}
    else:
        assert layers & {"blocks.0.conv_pwl", "blocks.1.conv_pwl"} == {"blocks.1.conv_pwl"}


def test_tied_weights_and_blocks_that_run_twice_stay_dense():
    model = seeded(lambda: Blocks(Mlp(), Mlp(), Mlp()))
    model.blocks[1].up.weight = model.blocks[0].up.weight
    report = prune_units(model, vectors())
    assert {layer.name for layer in report.layers} == {"blocks.2.up", "blocks.2.down"}
    shared = Mlp()
    twice = seeded(lambda: Blocks(Mlp(), shared, Mlp(), shared))
    report = prune_units(twice, vectors())
    assert {layer.name for layer in report.layers} == {f"blocks.{n}.{name}" for n in (0, 2) for name in ("up", "down")}


# ---- scores, solvers, allocations


@pytest.mark.parametrize(
    ("name", "reader"), [("llama", "model.layers.1.mlp.down_proj"), ("resnet50", "layer3.1.conv2")]
)
def test_the_units_with_the_smallest_sums_of_squared_scores_become_zero(name, reader):
    model, batches = specimen(name)
    module, calls = model.get_submodule(reader), calls_of(model, [reader], batches)[reader]
    x = torch.cat([x if x.ndim == 4 else x.flatten(0, -2) for (x,) in calls])
    if x.ndim == 4:
        tokens = reference.im2col(reference.array(x), module.kernel_size, module.stride, module.padding)
        weight = reference.array(module.weight.permute(0, 2, 3, 1).flatten(1))
    else:
        tokens, weight = reference.array(x), reference.array(module.weight)
    width, dense = module.weight.shape[1], module.weight.detach().clone()
    scores = np.abs(weight) * np.sqrt((tokens**2).sum(axis=0))
    totals = (scores**2).sum(axis=0).reshape(-1, width).sum(axis=0)
    smallest = set(np.argsort(totals)[: width - reference.kept_units(width, 0.5, 4)].tolist())
    prune_units(model, batches, method="wanda", sequential="none")
    zero = (module.weight == 0).movedim(1, 0).flatten(1).all(dim=1)
    assert set(zero.nonzero().flatten().tolist()) == smallest
    rest = ~zero if name == "llama" else slice(0, 0)  # conv2 also loses rows, as conv3 reads them
    assert torch.equal(module.weight[:, rest], dense[:, rest])


@pytest.mark.parametrize("name", ["llama", "interleaved"])
def test_fisher_scores_units_by_their_effect_on_the_loss(name):
    """Against autograd: (x * dL/dx)^2 summed over tokens, with the labels that are drawn in the package."""
    (model, batches), held = specimen(name), {}
    readers = list(found_in(model, batches).coupled)
    expected = dict.fromkeys(readers, 0.0)

    def keep(reader, module, args):
        held[reader] = args[0]
        args[0].retain_grad()

    hooks = [model.get_submodule(reader).register_forward_pre_hook(partial(keep, reader)) for reader in readers]
    samples = [x for batch in batches for x in (split([batch], 1) if isinstance(batch, dict) else batch.split(1))]
    for index, sample in enumerate(samples):
        logits = run(model, sample).flatten(0, -2)
        F.cross_entropy(logits, drawn(logits, index), reduction="sum").backward()
        for reader, x in held.items():
            expected[reader] += (x.detach() * x.grad).flatten(0, -2).square().sum(dim=0)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    own = coupled_run(model, batches, allocation="fisher")
    with pruning_mode(model):
        got = gradient_statistics(model, own.plan.layers, own.plan.blocks, own.samples, columns=own.plan.unit_columns)
    for reader in readers:
        torch.testing.assert_close(got[reader].units, expected[reader], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("zeros", [0, 50])
def test_fisher_meets_the_target_within_one_multiple(sparsity, zeros):
    """Also if many units, such as dead ones, have the same score."""
    draw = torch.Generator().manual_seed(1)
    scores = [torch.rand(96, generator=draw) * scale for scale in (1, 2, 3, 4)]
    for each in scores[:2]:
        each[:zeros] = 0
    layers = [UnitLayer(f"layer.{n}", "*", len(each), each) for n, each in enumerate(scores)]
    got = Fisher().of_units(layers, sparsity, Structured(8))
    removed = [round(share * 96) for share in got.values()]
    assert all(number % 8 == 0 for number in removed)
    assert int(4 * 96 * sparsity) <= sum(removed) < 4 * 96 * sparsity + 8
    assert removed[0] > removed[3]
    assert max(removed) <= 96 * max(0.6, (1 + sparsity) / 2) + 4


@pytest.mark.parametrize(
    ("widths", "sparsity", "kept"),
    [
        ((384, 768, 1536, 3072), 0.3, (272, 544, 1088, 2176)),  # mlp_ratio=4 of ConvNeXt: one ratio, 17 / 24
        ((192, 384, 640, 1216), 0.3, (144, 288, 480, 912)),  # 3 / 4
        ((1536, 1536), 0.25, (1152, 1152)),
        ((96, 144, 240), 0.25, (72, 112, 176)),  # no ratio near 3 / 4 leaves multiples of 8: each on its own
        ((16, 32, 64), 0.25, (16, 24, 48)),
    ],
)
def test_uniform_gives_one_ratio_to_all_layers_of_a_kind(widths, sparsity, kept):
    pattern = Structured(8)
    layers = [UnitLayer(f"stages.{n}.fc2", "stages.*.fc2", width) for n, width in enumerate(widths)]
    got = Uniform().of_units([*layers, UnitLayer("other", "other", 100)], sparsity, pattern)
    numbers = [pattern.kept(width, got[layer.name]) for layer, width in zip(layers, widths, strict=True)]
    assert tuple(numbers) == kept


# ---- laws


@pytest.mark.parametrize("method", ["fast", "balanced"])
@pytest.mark.parametrize("name", ["llama", "mobile"])
def test_pruning_twice_changes_nothing(name, method):
    (model, batches), states = specimen(name), []
    for _ in range(2):
        prune_units(model, batches, method=method, keep_batch_norm=True)
        states.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("recovery", ["reconstruct", "distil"])
def test_recoveries_keep_the_units_at_zero(recovery):
    model, batches = specimen("llama")
    prune_units(model, batches, recovery=recovery, sequential="block")
    for layer in model.model.layers:
        units = (layer.mlp.down_proj.weight == 0).all(dim=0)
        assert int(units.sum()) == 32
        assert not layer.mlp.up_proj.weight[units].any()
        assert not layer.mlp.gate_proj.weight[units].any()


# ---- the report


def size_of(model):
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return sum(p.numel() for p in model.parameters()), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", ["llama", "resnet50", "mobile", "phi3"])
def test_the_report_says_what_taking_the_units_out_saves(name):
    """Against the parameters and bytes of the model whose units are taken out."""
    model, batches = specimen(name)
    plan, report = found_in(model, batches), prune_units(model, batches, keep_batch_norm=True)
    zero = {reader: int(units.slots[-1].zeros().sum()) for reader, units in plan.coupled.items()}
    (before, size), (after, smaller), (parameters, whole) = (
        cost_without(plan, {}),
        cost_without(plan, zero),
        size_of(model),
    )
    for units in plan.coupled.values():
        units.take(~units.slots[-1].zeros())
    fewer, rest = size_of(model)
    assert (before - after, size - smaller) == (parameters - fewer, whole - rest)
    text = f"takes out {parameters - fewer:,} of {parameters:,} parameters ({(parameters - fewer) / parameters:.1%})"
    assert sum(text in note for note in report.notes) == 1
    assert text in str(report)


def test_a_sparsity_that_rounds_to_no_unit_is_named(caplog):
    report = prune(*specimen("llama"), 0.05, pattern="structured", progress=False)
    text = "none of 128 hidden units is zero, because sparsity=0.05 rounds to no unit of any layer"
    assert any(note.startswith(text) for note in report.notes)
    assert text in caplog.text


def test_layers_whose_units_are_never_written_name_their_writers_too():
    """A reader that no token but padding reaches stays dense, and so does what writes its units."""
    model = seeded(lambda: Blocks(Mlp(nn.ReLU()), Mlp(nn.ReLU())))
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
        model.blocks[0].up.bias.fill_(-1.0)
    report = prune_units(model, vectors())
    skipped = {matrix.name: matrix.reason for matrix in report.skipped}
    assert skipped["blocks.0.up"] == skipped["blocks.0.down"] == SkipReason.INACTIVE
    assert {layer.name for layer in report.layers} == {"blocks.1.up", "blocks.1.down"}


# ---- what is refused, before anything is written


def adapted():
    return get_peft_model(ZOO["llama"].build(), LoraConfig(target_modules=["up_proj"], r=2))


def apart():
    return nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32))


@pytest.mark.parametrize(
    ("make", "choices", "text"),
    [
        (
            None,
            {"pattern": Structured(64)},
            "multiple_of=64 of pattern=Structured(multiple_of=64, columns=1) leaves no",
        ),
        (
            None,
            {"sparsity": 0.95},
            "sparsity=0.95 would remove all 64 hidden units: the widest layer, model.layers.0.mlp",
        ),
        (None, {"permutation": "assignment"}, "permutation='assignment' cannot be combined with pattern='struc"),
        (None, {"allocation": "owl"}, "allocation='owl' cannot be combined with pattern='structured'"),
        (None, {"allocation": "alpha"}, "Choose from uniform, fisher."),
        (None, {"solver": "admm"}, "solver='admm' cannot be combined with pattern='structured'"),
        (None, {"method": "sparsegpt"}, "Choose from zero_out, refit."),
        (None, {"skip": ["*.mlp.*"]}, "finds no hidden units in the model: in no block does one layer read"),
        (adapted, {}, "Merge adapters first"),
        (apart, {}, "finds no hidden units"),
    ],
)
def test_what_does_not_fit_is_refused(make, choices, text):
    model, batches = specimen("llama")
    model, batches = make() if make else model, vectors() if make is apart else batches
    assert text in refusal(model, batches, **{"pattern": "structured", **choices})
