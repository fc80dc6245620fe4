"""Structured zeros fill whole hidden units, in every architecture, and what is no unit of its own stays dense."""

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from support import reference
from support.mlps import MIXING, Mlp
from support.refusals import refusal
from support.zoo import ZOO, run, seeded
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import nn
from torch.nn import functional as F

from wanda_lightning import Fisher, PruningConfig, Refit, Structured, prune
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.progress import ProgressBar
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
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return hf.Phi3ForCausalLM(hf.Phi3Config(vocab_size=128, initializer_range=0.2, **sizes, **tokens))


def mobile(reduced=8):
    """Inverted residuals with a depthwise convolution and squeeze-and-excitation."""
    squeeze = partial(SqueezeExcite, rd_channels=reduced)
    blocks = (InvertedResidual(16, 16, exp_ratio=2, se_layer=squeeze) for _ in range(2))
    return Blocks(*blocks, stem=nn.Conv2d(3, 16, 3), width=16)


def vectors(number=3):
    return [torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(number)]


def images(number=3):
    return [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(number)]


MODELS = {
    **{
        name: (ZOO[name].build, ZOO[name].batches)
        for name in ("llama", "gpt2", "vit", "convnext", "plain_mlp", "resnet18", "resnet50")
    },
    "phi3": (partial(seeded, phi3), ZOO["llama"].batches),
    "mobile": (partial(seeded, mobile), images),
    "interleaved": (partial(seeded, lambda: Blocks(Interleaved(), Interleaved())), vectors),
}


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


@pytest.mark.parametrize("name", MODELS)
def test_the_units_of_each_architecture(name):
    """They are those that are listed, and setting them to zero is the same as taking them out."""
    make, batches = MODELS[name]
    model = make()
    names = {tensor: key for key, tensor in model.state_dict(keep_vars=True).items()}
    plan = found_in(model, batches())
    for reader, expected in SLOTS[name].items():
        own = [(names[slot.tensor], slot.dim) for slot in plan.coupled[reader].slots]
        assert sorted(own) == sorted((place(reader, tensor), dim) for tensor, dim, *_ in expected)
    alike = {reader.translate(str.maketrans("", "", "0123456789")) for reader in SLOTS[name]}
    assert {reader.translate(str.maketrans("", "", "0123456789")) for reader in plan.coupled} >= alike
    dense = run(model, batches()[0]).detach()
    for units in plan.coupled.values():
        units.zero(torch.arange(units.width) % 3 == 1)
    zero = run(model, batches()[0]).detach()
    assert not torch.allclose(zero, dense, atol=1e-3)
    for units in plan.coupled.values():
        assert torch.equal(units.slots[-1].zeros(), torch.arange(units.width) % 3 == 1)
        units.take(~units.slots[-1].zeros())
    torch.testing.assert_close(run(model, batches()[0]).detach(), zero, rtol=1e-4, atol=1e-4)
    for module in model.modules():  # the attributes are those of the new shapes
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == module.weight.shape[:2]
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight)


@pytest.mark.parametrize("name", MODELS)
def test_zeros_fill_the_units_and_nothing_else_changes(name):
    make, batches = MODELS[name]
    model = make()
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    solver = Refit(intercept=False)  # biases stay
    report = prune(model, batches(), 0.5, pattern=EACH_OF_4, solver=solver, keep_batch_norm=True, progress=False)
    pruned, changed = model.state_dict(), {layer.name for layer in report.layers}
    every = [place(reader, tensor) for reader, slots in SLOTS[name].items() for tensor, *_ in slots]
    for reader, slots in SLOTS[name].items():
        *_, (last, dim, *_) = slots
        weight = pruned[place(reader, last)].movedim(dim, 0).flatten(1)
        units = (weight == 0).all(dim=1)
        assert int(units.sum()) == len(units) - reference.kept_units(len(units), 0.5, 4)
        record = next(layer for layer in report.layers if layer.name == reader)
        assert record.target == pytest.approx(float(units.float().mean()))
        assert f"{int(units.sum())} of {len(units)} hidden units are zero" in record.note
        for tensor, dim, *copies in slots:
            key = place(reader, tensor)
            rows = pruned[key].movedim(dim, 0).reshape(pruned[key].shape[dim], -1)
            before = dense[key].movedim(dim, 0).reshape(rows.shape)
            where = entries(units, *copies)
            if "running" in tensor:  # a statistic does not count: the unit's own weight and bias are zero
                assert torch.equal(rows, before)
            else:
                assert (rows[where] == 0).all()
            if key != place(reader, last) and every.count(key) == 1:
                assert torch.equal(rows[~where], before[~where])
    own = {key for key in pruned if not torch.equal(pruned[key], dense[key])}
    modules = {key.rpartition(".")[0] for key in own}
    between = {key for key in modules if key not in changed}
    assert all(isinstance(model.get_submodule(key), nn.BatchNorm2d | nn.Conv2d) for key in between)
    assert changed <= modules
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert layer.sparsity == pytest.approx(float((weight == 0).float().mean()), abs=1e-9)


def test_every_matrix_is_in_the_report_once():
    for name in ("llama", "resnet50", "mobile", "convnext"):
        make, batches = MODELS[name]
        model = make()
        report = prune(model, batches(), 0.5, pattern=EACH_OF_4, progress=False)
        found = [layer.name for layer in report.layers] + [matrix.name for matrix in report.skipped]
        every = {key.removesuffix(".weight") for key, p in model.named_parameters() if p.ndim > 1}
        assert sorted(found) == sorted(every)


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("norm", [*MIXING, "mixed"])
def test_units_that_depend_on_each_other_stay_dense(norm, scale):
    """Also if a small scale of the branch, or a last layer of zeros, hides the difference in the results."""
    between = nn.Linear(64, 64) if norm == "mixed" else MIXING[norm](64)
    model = seeded(lambda: Blocks(Mlp(), Mlp(between, scale), Mlp(nn.ReLU())))
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(scale == 1)
    report = prune(model, vectors(), 0.5, pattern=EACH_OF_4, progress=False)
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
    make, batches = MODELS[name]
    model = make().to(dtype)
    given = [x.to(dtype) if torch.is_tensor(x) else x for x in batches()]
    given = [(x[0].to(dtype), *x[1:]) if isinstance(x, tuple) else x for x in given]
    expected = found_in(make(), batches())
    assert list(found_in(model, given).coupled) == list(expected.coupled)


def test_a_skipped_writer_leaves_only_the_units_of_its_block():
    make, batches = MODELS["llama"]
    for skip in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"):
        model = make()
        dense = copy.deepcopy(model.model.layers[0].mlp).state_dict()
        report = prune(model, batches(), 0.5, pattern=EACH_OF_4, skip=[skip], progress=False)
        assert [layer.name for layer in report.layers] == [
            f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
        ]
        own = model.model.layers[0].mlp.state_dict()
        assert all(torch.equal(own[key], dense[key]) for key in dense)


@pytest.mark.parametrize("skip", ["blocks.0.se.conv_reduce", "blocks.0.conv_dw", "blocks.0.se.conv_expand"])
def test_a_skipped_layer_between_writers_and_reader_leaves_the_units_alone(skip):
    make, batches = MODELS["mobile"]
    model = make()
    dense = copy.deepcopy(model.get_submodule(skip).state_dict())
    report = prune(model, batches(), 0.5, pattern=EACH_OF_4, skip=[skip], progress=False)
    assert all(torch.equal(model.get_submodule(skip).state_dict()[key], dense[key]) for key in dense)
    assert "blocks.0.conv_pwl" not in {layer.name for layer in report.layers}
    assert "blocks.1.conv_pwl" in {layer.name for layer in report.layers}


def test_tied_weights_and_blocks_that_run_twice_stay_dense():
    model = seeded(lambda: Blocks(Mlp(), Mlp(), Mlp()))
    model.blocks[1].up.weight = model.blocks[0].up.weight
    report = prune(model, vectors(), 0.5, pattern=EACH_OF_4, progress=False)
    assert {layer.name for layer in report.layers} == {"blocks.2.up", "blocks.2.down"}
    shared = Mlp()
    twice = seeded(lambda: Blocks(Mlp(), shared, Mlp(), shared))
    report = prune(twice, vectors(), 0.5, pattern=EACH_OF_4, progress=False)
    assert {layer.name for layer in report.layers} == {f"blocks.{n}.{name}" for n in (0, 2) for name in ("up", "down")}


# ---- scores, solvers, allocations


def inputs_of(model, batches, modules):
    """The inputs of modules for all batches, by slow hooks."""
    entered = {name: [] for name in modules}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: entered[name].append(args[0].detach())
        )
        for name in modules
    ]
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x if x.ndim == 4 else x.flatten(0, -2) for x in each]) for name, each in entered.items()}


@pytest.mark.parametrize(
    ("name", "reader"), [("llama", "model.layers.1.mlp.down_proj"), ("resnet50", "layer3.1.conv2")]
)
def test_the_units_with_the_smallest_sums_of_squared_scores_become_zero(name, reader):
    make, batches = MODELS[name]
    model = make()
    x, module = inputs_of(model, batches(), [reader])[reader], model.get_submodule(reader)
    if x.ndim == 4:
        tokens = reference.im2col(reference.array(x), module.kernel_size, module.stride, module.padding)
        weight = reference.array(module.weight.permute(0, 2, 3, 1).flatten(1))
    else:
        tokens, weight = reference.array(x), reference.array(module.weight)
    width, dense = module.weight.shape[1], module.weight.detach().clone()
    scores = np.abs(weight) * np.sqrt((tokens**2).sum(axis=0))
    totals = (scores**2).sum(axis=0).reshape(-1, width).sum(axis=0)
    smallest = set(np.argsort(totals)[: width - reference.kept_units(width, 0.5, 4)].tolist())
    prune(model, batches(), 0.5, method="wanda", pattern=EACH_OF_4, sequential="none", progress=False)
    zero = (module.weight == 0).movedim(1, 0).flatten(1).all(dim=1)
    assert set(zero.nonzero().flatten().tolist()) == smallest
    rest = ~zero if name == "llama" else slice(0, 0)  # conv2 also loses rows, as conv3 reads them
    assert torch.equal(module.weight[:, rest], dense[:, rest])


def drawn(logits, index):
    generator = torch.Generator().manual_seed(index)
    return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("name", ["llama", "interleaved"])
def test_fisher_scores_units_by_their_effect_on_the_loss(name):
    """Against autograd: (x * dL/dx)^2 summed over tokens, with the labels that are drawn in the package."""
    make, batches = MODELS[name]
    model = make()
    readers = list(found_in(model, batches()).coupled)
    expected, held = dict.fromkeys(readers, 0.0), {}
    samples = [
        {key: value[n : n + 1] for key, value in batch.items()} if isinstance(batch, dict) else batch[n : n + 1]
        for batch in batches()
        for n in range(len(next(iter(batch.values())) if isinstance(batch, dict) else batch))
    ]
    for index, sample in enumerate(samples):
        hooks = [
            model.get_submodule(reader).register_forward_pre_hook(
                lambda module, args, reader=reader: held.update({reader: args[0]}) or args[0].retain_grad()
            )
            for reader in readers
        ]
        logits = run(model, sample)
        logits = logits.reshape(-1, logits.shape[-1])
        F.cross_entropy(logits, drawn(logits, index), reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for reader, x in held.items():
            expected[reader] += (x.detach() * x.grad).flatten(0, -2).square().sum(dim=0)
    model.zero_grad()
    own = coupled_run(model, batches(), allocation="fisher")
    with pruning_mode(model), ProgressBar("", None, False) as bar:
        got = own.store.pass_backward(own, bar)
    for reader in readers:
        torch.testing.assert_close(got[reader].units, expected[reader], rtol=1e-3, atol=1e-9)


def layers_with(scores, kind="*"):
    return [UnitLayer(f"layer.{n}", kind, len(each), torch.tensor(each)) for n, each in enumerate(scores)]


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("zeros", [0, 50])
def test_fisher_meets_the_target_within_one_multiple(sparsity, zeros):
    """Also if many units, such as dead ones, have the same score."""
    draw = torch.Generator().manual_seed(1)
    scores = [(torch.rand(96, generator=draw) * scale).tolist() for scale in (1, 2, 3, 4)]
    for each in scores[:2]:
        each[:zeros] = [0.0] * zeros
    got = Fisher().of_units(layers_with(scores), sparsity, Structured(8))
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


@pytest.mark.parametrize("method", ["fast", "balanced", "best"])
@pytest.mark.parametrize("name", ["llama", "mobile"])
def test_pruning_twice_changes_nothing_and_a_seed_gives_one_mask(name, method):
    make, batches = MODELS[name]
    models = [make(), make()]
    for model in models:
        prune(model, batches(), 0.5, method=method, pattern=EACH_OF_4, keep_batch_norm=True, progress=False)
    once, other = ({key: value.clone() for key, value in model.state_dict().items()} for model in models)
    assert all(torch.equal(once[key], other[key]) for key in once)
    if method == "best":  # a second time, the gradients are those of the pruned model, and so are the sparsities
        return
    prune(models[0], batches(), 0.5, method=method, pattern=EACH_OF_4, keep_batch_norm=True, progress=False)
    again = models[0].state_dict()
    assert all(torch.equal(again[key], once[key]) for key in once)


@pytest.mark.parametrize("recovery", ["reconstruct", "distil"])
def test_recoveries_keep_the_units_at_zero(recovery):
    make, batches = MODELS["llama"]
    model = make()
    prune(model, batches(), 0.5, pattern=EACH_OF_4, recovery=recovery, sequential="block", progress=False)
    for layer in model.model.layers:
        units = (layer.mlp.down_proj.weight == 0).all(dim=0)
        assert int(units.sum()) == 32
        assert not layer.mlp.up_proj.weight[units].any()
        assert not layer.mlp.gate_proj.weight[units].any()


# ---- the report


@pytest.mark.parametrize("name", ["llama", "resnet50", "mobile", "phi3"])
def test_the_report_says_what_taking_the_units_out_saves(name):
    """Against the parameters and bytes of the model whose units are taken out."""
    make, batches = MODELS[name]
    model = make()
    plan = found_in(model, batches())
    report = prune(model, batches(), 0.5, pattern=EACH_OF_4, keep_batch_norm=True, progress=False)
    zero = {reader: int(units.slots[-1].zeros().sum()) for reader, units in plan.coupled.items()}
    (before, size), (after, smaller) = cost_without(plan, {}), cost_without(plan, zero)
    parameters, whole = sum(p.numel() for p in model.parameters()), bytes_of(model)
    for units in plan.coupled.values():
        units.take(~units.slots[-1].zeros())
    fewer = sum(p.numel() for p in model.parameters())
    assert (before - after, size - smaller) == (parameters - fewer, whole - bytes_of(model))
    text = f"takes out {parameters - fewer:,} of {parameters:,} parameters ({(parameters - fewer) / parameters:.1%})"
    assert sum(text in note for note in report.notes) == 1
    assert text in str(report)


def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


def test_a_sparsity_that_rounds_to_no_unit_is_named(caplog):
    make, batches = MODELS["llama"]
    with caplog.at_level(logging.WARNING):
        report = prune(make(), batches(), 0.05, pattern="structured", progress=False)
    text = "none of 128 hidden units is zero, because sparsity=0.05 rounds to no unit of any layer"
    assert any(note.startswith(text) for note in report.notes)
    assert text in caplog.text


def test_layers_whose_units_are_never_written_name_their_writers_too():
    """A reader that no token but padding reaches stays dense, and so does what writes its units."""
    model = seeded(lambda: Blocks(Mlp(nn.ReLU()), Mlp(nn.ReLU())))
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
        model.blocks[0].up.bias.fill_(-1.0)
    report = prune(model, vectors(), 0.5, pattern=EACH_OF_4, progress=False)
    skipped = {matrix.name: matrix.reason for matrix in report.skipped}
    assert skipped["blocks.0.up"] == skipped["blocks.0.down"] == SkipReason.INACTIVE
    assert {layer.name for layer in report.layers} == {"blocks.1.up", "blocks.1.down"}


# ---- what is refused, before anything is written


def adapted():
    return get_peft_model(MODELS["llama"][0](), LoraConfig(target_modules=["up_proj"], r=2))


@pytest.mark.parametrize(
    ("make", "choices", "text"),
    [
        (
            "llama",
            {"pattern": Structured(64)},
            "multiple_of=64 of pattern=Structured(multiple_of=64, columns=1) ",
        ),
        (
            "llama",
            {"sparsity": 0.95},
            "sparsity=0.95 would remove all 64 hidden units: the widest layer, model.layers.0.mlp.down_proj",
        ),
        ("llama", {"permutation": "assignment"}, "permutation='assignment' cannot be combined with pattern='struc"),
        ("llama", {"allocation": "owl"}, "allocation='owl' cannot be combined with pattern='structured'"),
        ("llama", {"allocation": "alpha"}, "Choose allocation from uniform, fisher."),
        ("llama", {"solver": "admm"}, "solver='admm' cannot be combined with pattern='structured'"),
        ("llama", {"method": "sparsegpt"}, "Choose solver from zero_out, refit."),
        ("llama", {"skip": ["*.mlp.*"]}, "finds no hidden units in the model: in no block does one layer read"),
        (adapted, {}, "Merge adapters first"),
        (lambda: nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)), {}, "finds no hidden units"),
    ],
)
def test_what_does_not_fit_is_refused(make, choices, text):
    build, batches = (
        MODELS["llama"] if make == "llama" else (make, ZOO["llama"].batches if make is adapted else vectors)
    )
    assert text in refusal(build(), batches(), **{"pattern": "structured", **choices})
