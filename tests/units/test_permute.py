"""Permuted models compute the same, in every family, and what cannot be permuted stays as it is."""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import peft
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.callbacks import ADAMW, Net, loader, trainer
from support.disk import same
from support.layers import assert_same, rng
from support.pair_cases import replicated
from support.pairwise import spread
from support.quiet import prune
from support.refusals import refuses
from support.samples import run_of
from support.zoo import ZOO, batches_of, cast, model_of, run_all, seeded
from torch import nn
from torch.nn import functional as F

from wanda_lightning import PruningCallback, WandaPrune
from wanda_lightning.models import find_layers
from wanda_lightning.units.permute import permute

READERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "mixtral": {"self_attn.o_proj"},
    "deepseek_v3": {
        "self_attn.q_b_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
        "mlp.shared_experts.down_proj",
    },
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "t5": {"layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"}
    | {f"layer.{index}.DenseReluDense.wo" for index in (1, 2)},
    "vit": {"attn.proj", "mlp.fc2"},
    "convnext": {"mlp.fc2"},
    "resnet18": set(),
    "efficientnet": {"se.conv_expand", "conv_pwl"},
}
"""The layers whose inputs can be permuted, by their names inside the block."""


PERMUTED = {"method": "wanda", "pattern": "2:4", "permutation": "assignment"}


prune_permuted = partial(prune, **PERMUTED)


def permute_model(model, batches, **choices):
    """Permute in place; return what was permuted."""
    choices = PERMUTED | choices
    return permute(run_of(model, batches, **choices))


def unchanged(model, dense):
    return same(model.state_dict(), dense)


def specimen(name):
    """A model and its batches; "efficientnet" has squeeze-and-excitation."""
    if name in ZOO:
        return model_of(name), batches_of(name)
    return seeded(lambda: timm.create_model("test_efficientnet", num_classes=7)), [
        torch.randn(2, 3, 64, 64)
    ]


@pytest.mark.parametrize(("name", "dtype"), spread(READERS, [torch.bfloat16, torch.float32]))
def test_the_model_computes_the_same(name, dtype):
    """Also with depthwise convolutions, BatchNorm and squeeze-and-excitation."""
    model, batches = specimen(name)
    model = model.to(dtype)
    batches = cast(batches, dtype)
    before = run_all(model, batches)
    dense = deepcopy(model.state_dict())
    blocks = find_layers(model).blocks
    done = permute_model(model, batches)
    assert {layer.removeprefix(f"{blocks[layer]}.") for layer in done.kept} == READERS[name]
    assert not done.put_back
    for layer, (kept_before, kept_after) in done.kept.items():
        changed = not torch.equal(model.state_dict()[f"{layer}.weight"], dense[f"{layer}.weight"])
        assert (kept_after > kept_before) == changed
    for old, new in zip(before, run_all(model, batches), strict=True):
        assert (old.double() - new.double()).norm() < (
            1e-5 if dtype == torch.float32 else 0.02
        ) * old.double().norm()


def test_it_is_pruned_as_a_model_that_was_permuted_before():
    model = model_of("llama")
    batches = batches_of("llama")
    expected = deepcopy(model)
    permute_model(expected, batches)
    prune(expected, batches, 0.5, method="wanda", pattern="2:4")
    report = prune_permuted(model, batches)
    assert unchanged(model, expected.state_dict())
    assert report.config["permutation"] == {"name": "Assignment", "iterations": 8}
    assert any(
        "the inputs of 4 layers are permuted, which raises the Wanda scores" in note
        for note in report.notes
    )
    noted = {
        layer.name.rpartition(".")[2]
        for layer in report.layers
        if "inputs permuted: kept score +" in layer.note
    }
    assert noted == {"o_proj", "down_proj"}
    assert report.seconds["permute"] > 0


def test_heads_that_a_group_does_not_fit_into_stay():
    model = model_of("llama")
    done = permute_model(model, batches_of("llama"), pattern="8:16")
    assert {layer.rpartition(".")[2] for layer in done.kept} == {"down_proj"}


def read_once(self, x):
    return x + self.down(self.hidden(x))


def read_twice(self, x):
    """Also without a layer; a large activation hides the difference in a norm."""
    weights = torch.arange(32).to(x.dtype)
    large = 10_000 * F.one_hot(torch.tensor(0), 16).to(x.dtype)
    return read_once(self, x) + large + (self.hidden(x) * weights).sum(-1, keepdim=True)


def read_by_another(self, x):
    """By a layer that is skipped; a large activation hides what it adds."""
    hidden = self.hidden(x)
    return (
        x + 1000 * F.one_hot(torch.tensor(0), 16) + self.down(hidden) * self.gate(hidden).sigmoid()
    )


def passed_on(self, x, seen):
    hidden = seen["hidden"] = self.hidden(x) + seen.get("hidden", 0)
    return x + self.down(hidden)


def one_of_two(self, x, other):
    """The layer that reads is the one that the batch asks for."""
    return x + (self.other if other else self.down)(self.hidden(x))


class Mlp(nn.Module):
    """A block whose hidden units are read in one of these ways."""

    def __init__(self, way=read_once):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.way = way
        if way is read_by_another:
            self.gate = nn.Linear(32, 1)
        if way is one_of_two:
            self.other = nn.Linear(32, 16)

    def forward(self, x, *more):
        return self.way(self, x, *more)

    def hidden(self, x):
        return F.relu(self.up(x))


class Blocks(nn.Module):
    """Two blocks."""

    def __init__(self, block=Mlp, run=lambda blocks, x: blocks[1](blocks[0](x))):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(), block()])
        self.run = run

    def forward(self, x, **options):
        return self.run(self.blocks, x, **options)


FIXED = {
    "read twice": lambda: Blocks(partial(Mlp, read_twice)),
    "read by another": lambda: Blocks(partial(Mlp, read_by_another)),
    "passed on": lambda: Blocks(
        partial(Mlp, passed_on), lambda blocks, x: blocks[1](blocks[0](x, seen := {}), seen)
    ),
}
MOVED_BACK = {
    "other layer": lambda: Blocks(
        partial(Mlp, one_of_two), lambda blocks, x, other: blocks[1](blocks[0](x, other), other)
    ),
    "called again": lambda: Blocks(run=lambda blocks, x: blocks[0](blocks[1](blocks[0](x)))),
}


def images(dtype=torch.float32):
    draw = rng()
    return [torch.randn(2, 5, 16, generator=draw).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("kind", "dtype"), spread(FIXED, [torch.float32, torch.bfloat16, torch.float16])
)
def test_what_cannot_be_permuted_stays_exactly_as_it_is(kind, dtype, caplog):
    model = FIXED[kind]().to(dtype)
    dense = deepcopy(model.state_dict())
    skip = ["*.gate"] if kind == "read by another" else []
    assert permute_model(model, images(dtype), skip=skip).kept == {}
    assert unchanged(model, dense)
    report = prune_permuted(model, images(dtype), skip=skip)
    note = "nothing is permuted for 2:4: no layer reads hidden units whose order can be changed"
    assert note in report.notes
    assert note in caplog.text


@pytest.mark.parametrize("kind", MOVED_BACK)
def test_units_are_put_back_if_another_call_uses_them_in_another_way(kind, caplog):
    model = MOVED_BACK[kind]()
    dense = deepcopy(model.state_dict())
    batches = (
        images()
        if kind == "called again"
        else [{"x": x, "other": n % 2 == 1} for n, x in enumerate(images())]
    )
    done = permute_model(model, batches)
    assert done.put_back == (("blocks.0", "blocks.1") if kind == "other layer" else ("blocks.0",))
    assert done.kept.keys() == (set() if kind == "other layer" else {"blocks.1.down"})
    assert all(
        torch.equal(v, dense[n])
        for n, v in model.state_dict().items()
        if not n.startswith("blocks.1.")
    )
    assert unchanged(model, dense) == (kind == "other layer")
    prune_permuted(model, batches)
    assert "were put back, blocks.0 first, because its output changed" in caplog.text


def tied():
    model = Blocks()
    model.blocks[1].up.weight.data = model.blocks[0].up.weight.data
    return model


def adapted():
    return peft.get_peft_model(
        model_of("llama"),
        peft.LoraConfig(target_modules=["up_proj", "o_proj"], init_lora_weights=False),
    )


@pytest.mark.parametrize(("make", "batches"), [(tied, images), (adapted, ZOO["llama"].batches)])
def test_tied_blocks_and_adapters_keep_their_order(make, batches):
    model = make()
    dense = deepcopy(model.state_dict())
    with model.disable_adapter() if make is adapted else nullcontext():
        assert permute_model(model, batches()).kept == {}
    assert unchanged(model, dense)


def test_no_batches_and_bad_batches():
    with refuses(r"must hold at least one calibration batch for permutation=.assignment"):
        prune_permuted(Blocks(), [], method="magnitude")
    with refuses("NaN"):
        prune_permuted(Blocks(run=lambda blocks, x: blocks[1](blocks[0](x) * torch.nan)), images())


def test_two_processes_permute_alike(pair):
    batches = batches_of("llama")
    choices = {"method": "magnitude", "pattern": "2:4", "permutation": "assignment"}
    for shares in (None, [[0, 1], []]):
        (weights, report), (others, _) = pair.run(replicated, "llama", shares, **choices)
        assert_same(weights, others)
        assert any("the inputs of 4 layers are permuted" in note for note in report.notes)
    model = model_of("llama")
    prune_permuted(model, batches, method="magnitude")
    assert_same(weights, dict(model.named_parameters()))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("at_step", "make_others", "permuted"),
    [
        (0, lambda: [], True),
        (2, lambda: [], False),
        (0, lambda: [EMAWeightAveraging(decay=0.8)], False),
        (0, lambda: [WandaPrune(only=["*.up"], num_samples=12)], False),
    ],
)
def test_a_callback_permutes_only_what_nothing_else_has_stored(at_step, make_others, permuted):
    callback = PruningCallback(
        0.5,
        at_step=at_step,
        method="wanda",
        pattern="2:4",
        permutation="assignment",
        num_samples=12,
    )
    module = Net(ADAMW)
    module.layers = nn.Sequential(nn.Linear(32, 16), Mlp(), Mlp())

    with (
        nullcontext()
        if permuted
        else pytest.warns(UserWarning, match="permutes nothing during training")
    ):
        trainer(*make_others(), callback, max_steps=3).fit(module, loader(), loader())
    assert (
        any("the inputs of 2 layers are permuted" in note for note in callback.report.notes)
        == permuted
    )
    assert all((layer.up.weight == 0).float().mean() >= 0.5 for layer in module.layers[1:])
