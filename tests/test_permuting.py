"""Permuted models compute the same, in every family, and what cannot be permuted stays as it is."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.callbacks import ADAMW, Net, loader, trainer
from support.pair_cases import permute_both
from support.zoo import ZOO, run
from torch import nn
from torch.nn import functional as F

from wanda_lightning import Assignment, NoPermutation, PruningCallback, PruningConfig, prune
from wanda_lightning.calibration.batches import CalibrationBatches
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.permuting import permute
from wanda_lightning.plan import make_plan
from wanda_lightning.weight_store import WeightStore

READERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "mistral": {"self_attn.o_proj", "mlp.down_proj"},
    "gemma3": {"self_attn.o_proj", "mlp.down_proj"},
    "mixtral": {"self_attn.o_proj"},
    "deepseek_v3": {"self_attn.q_b_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.shared_experts.down_proj"},
    "gpt_oss": {"self_attn.o_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "t5": {
        "layer.0.SelfAttention.o",
        "layer.1.EncDecAttention.o",
        "layer.1.DenseReluDense.wo",
        "layer.2.DenseReluDense.wo",
    },
    "vit": {"attn.proj", "mlp.fc2"},
    "convnext": {"mlp.fc2"},
    "resnet18": set(),
}
"""The layers whose inputs can be permuted, by their names inside the block."""


def varied(model):
    """Give every unit its own bias and norm weight, so that none can be forgotten."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def plan_for(model):
    return make_plan(PruningConfig.from_names(method="wanda", pattern="2:4", permutation="assignment"), model)


def permute_model(plan, batches):
    """Permute in place; return what was permuted."""
    data = CalibrationBatches(plan.model, batches, None, None, SINGLE_PROCESS, "Assignment()")
    with pruning_mode(plan.model):
        return permute(plan, data, WeightStore(), progress=False)


def outputs(model, batches):
    with torch.no_grad():
        return [run(model, batch) for batch in batches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", READERS)
def test_the_model_computes_the_same(name, dtype):
    model, batches = varied(ZOO[name].build()).to(dtype), ZOO[name].batches()
    if name in ("vit", "convnext", "resnet18"):
        batches = [(images.to(dtype), *rest) for images, *rest in batches]
    before, dense, plan = outputs(model, batches), copy.deepcopy(model.state_dict()), plan_for(model)
    done = permute_model(plan, batches)
    inside = {layer.removeprefix(f"{plan.inventory.blocks[layer]}.") for layer in done.kept}
    assert inside == READERS[name]
    for layer, (kept_before, kept_after) in done.kept.items():
        changed = not torch.equal(model.state_dict()[f"{layer}.weight"], dense[f"{layer}.weight"])
        assert (kept_after > kept_before) == changed
    for old, new in zip(before, outputs(model, batches), strict=True):
        difference = (old.double() - new.double()).norm() / old.double().norm()
        assert difference < (1e-5 if dtype == torch.float32 else 0.02)


def test_it_is_pruned_as_a_model_that_was_permuted_before():
    model, batches = ZOO["llama"].build(), ZOO["llama"].batches()
    expected = copy.deepcopy(model)
    permute_model(plan_for(expected), batches)
    choices = {"pattern": "2:4", "method": "wanda", "progress": False}
    prune(expected, batches, 0.5, **choices)
    report = prune(model, batches, 0.5, permutation="assignment", **choices)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert report.config["permutation"] == {"name": "Assignment", "iterations": 8}
    assert any("the inputs of 4 layers are permuted, which raises the Wanda scores" in note for note in report.notes)
    noted = {layer.name.rpartition(".")[2] for layer in report.layers if "inputs permuted: kept score +" in layer.note}
    assert noted == {"o_proj", "down_proj"}
    assert report.seconds["permute"] > 0


def test_values_that_heads_share_are_permuted_together():
    model, batches = ZOO["llama"].build(), ZOO["llama"].batches()
    attention = model.model.layers[0].self_attn
    values, output = (layer.weight.detach().clone() for layer in (attention.v_proj, attention.o_proj))
    permute_model(plan_for(model), batches)
    size, groups = attention.head_dim, attention.num_key_value_groups
    for row, new in enumerate(attention.v_proj.weight):
        (old,) = (values == new).all(1).nonzero().flatten().tolist()
        head = row // size
        assert old // size == head
        for copy_ in range(groups):
            start = (head * groups + copy_) * size
            assert torch.equal(attention.o_proj.weight[:, start + row % size], output[:, start + old % size])


class ReadsTwice(nn.Module):
    """A block whose hidden units are also read by something that is no layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        hidden = F.relu(self.up(x))
        return x + self.down(hidden) + (hidden * torch.arange(32.0)).sum(-1, keepdim=True)


class PassesOn(nn.Module):
    """Two blocks of which the first passes its hidden units to the second, through an object."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([WritesDown(), WritesDown()])

    def forward(self, x):
        seen = {}
        for block in self.blocks:
            x = block(x, seen)
        return x


class WritesDown(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, seen):
        hidden = F.relu(self.up(x)) + seen.get("hidden", 0)
        seen["hidden"] = hidden
        return x + self.down(hidden)


class TiedToItself(nn.Module):
    """A block whose writer has the weight of another module."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.other.weight = self.up.weight

    def forward(self, x):
        return x + self.down(F.relu(self.up(x))) + F.relu(self.other(x))


class OddHeads(nn.Module):
    """A block whose heads are no multiple of four."""

    head_dim = 6

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(*size) for size in ((8, 12), (8, 12), (8, 12), (12, 8)))

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (2, 6)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


FIXED = {
    "read twice": (lambda: nn.Sequential(ReadsTwice(), ReadsTwice()), 16),
    "passed on": (PassesOn, 16),
    "tied": (lambda: nn.Sequential(TiedToItself(), TiedToItself()), 16),
    "odd heads": (lambda: nn.Sequential(OddHeads(), OddHeads()), 8),
}


@pytest.mark.parametrize("kind", FIXED)
def test_what_cannot_be_permuted_stays_exactly_as_it_is(kind, caplog):
    torch.manual_seed(0)
    build, width = FIXED[kind]
    model = build()
    dense = copy.deepcopy(model.state_dict())
    batches = [torch.randn(2, 5, width) for _ in range(3)]
    assert permute_model(plan_for(model), batches).kept == {}
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    report = prune(model, batches, 0.5, method="wanda", pattern="2:4", permutation="assignment", progress=False)
    note = "nothing is permuted for 2:4: no layer reads hidden units whose order can be changed"
    assert note in report.notes
    assert note in caplog.text


def test_presets_permute_only_where_the_order_matters():
    assert PruningConfig.from_names(0.5, method="best", pattern="2:4").permutation == Assignment()
    assert (
        PruningConfig.from_names(0.5, method="best", pattern="2:4", permutation="none").permutation == NoPermutation()
    )
    assert PruningConfig.from_names(0.5, method="best").permutation == NoPermutation()
    assert PruningConfig.from_names(0.5, method="wanda", pattern="2:4").permutation == NoPermutation()
    with pytest.raises(ValueError, match="permutation must be of class Permutation or one of none, assignment"):
        PruningConfig.from_names(0.5, pattern="2:4", permutation=True)


def test_two_processes_permute_alike(pair):
    batches = ZOO["llama"].batches()
    for shares in (None, [[0, 1], []]):
        (weights, notes), (others, _) = pair.run(permute_both, batches, shares)
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
        assert any("the inputs of 4 layers are permuted" in note for note in notes)
    model = ZOO["llama"].build()
    prune(model, batches, 0.5, method="magnitude", pattern="2:4", permutation="assignment", progress=False)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Blocks(Net):
    def __init__(self):
        super().__init__(ADAMW)
        torch.manual_seed(0)
        self.layers = nn.Sequential(Block(), Block(), nn.Linear(32, 16))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("at_step", [0, 2])
@pytest.mark.parametrize("averages", [False, True])
def test_a_callback_permutes_only_before_training(at_step, averages):
    choices = {"method": "wanda", "pattern": "2:4", "permutation": "assignment", "num_samples": 12}
    callback = PruningCallback(0.5, at_step=at_step, **choices)
    others = [EMAWeightAveraging(decay=0.8)] if averages else []
    fit = trainer(*others, callback, max_steps=3).fit
    if at_step or averages:
        with pytest.warns(UserWarning, match="permutes nothing during training"):
            fit(Blocks(), loader(), loader())
        assert not any("are permuted" in note for note in callback.report.notes)
    else:
        fit(Blocks(), loader(), loader())
        assert any("the inputs of 2 layers are permuted" in note for note in callback.report.notes)
