"""Tokens of experts: by hand, whatever formula multiplies them; experts with few are pruned by what all saw."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from support import reference
from support.experts import SPECIMENS, Stack, double, experts_of, observed, routed_tokens, starved
from support.layers import rng
from support.pairwise import spread
from support.quiet import prune
from support.samples import calls_of
from support.zoo import batches_of, model_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers


@pytest.fixture
def set_minimum(monkeypatch):
    return partial(monkeypatch.setattr, "wanda_lightning.calibration.observer.MIN_EXPERT_TOKENS")


@torch.no_grad()
def by_hand(model, batches):
    """The tokens routed to each expert's matrix by the model's own router, one by one."""
    inputs = {}
    experts = experts_of(model)
    for name, calls in calls_of(model, experts, batches).items():
        for args in calls:
            for (parameter, expert), tokens in routed_tokens(experts[name], *args).items():
                inputs.setdefault(f"{name}.{parameter}.{expert}", []).extend(tokens)
    return {name: torch.tensor(np.stack(tokens)) for name, tokens in inputs.items()}


@pytest.mark.parametrize("name", SPECIMENS)
def test_statistics_are_of_the_tokens_routed_to_each_expert(name):
    model = double(name)
    batches = batches_of("mixtral")
    expected = by_hand(model, batches)
    statistics = observed(model, batches)
    assert statistics.keys() >= expected.keys()

    for expert, tokens in expected.items():
        sums = statistics[expert].sums
        assert statistics[expert].count == len(tokens), expert
        assert_close(sums["square_sum"], tokens.square().sum(0))
        assert_close(sums["gram"], tokens.T @ tokens)
    unreached = statistics.keys() - expected.keys()
    assert not any(statistics[expert].count for expert in unreached)


class Formula(Stack):
    """Experts of remote code, by a formula of its own."""

    def __init__(self, formula):
        super().__init__(num_experts=4, hidden_size=32)
        self.forward = partial(formula, self.up_proj, self.down_proj)


FORMULAS = {
    "all tokens": lambda up, down, x: torch.bmm(
        torch.bmm(x.expand(4, -1, -1), up.mT).relu(), down.mT
    ).mean(0),
    "broadcast": lambda up, down, x: (
        (x[None] @ up.transpose(1, 2)).relu() @ down.transpose(1, 2)
    ).mean(0),
}


def by_halves(up, down, x):
    """The rows of an expert in two pieces."""
    parts = []
    for expert in range(4):
        first, second = up[expert].chunk(2)
        hidden = torch.cat([F.linear(x[expert::4], first), x[expert::4].matmul(second.T)], dim=-1)
        parts.append(torch.mm(hidden.relu(), down[expert].t()))
    return torch.cat(parts)


def by_copies(up, down, x):
    chosen = torch.arange(len(x)) % 4
    return torch.bmm(down[chosen], torch.bmm(up[chosen], x[:, :, None]).relu())[:, :, 0]


BATCHES = [torch.randn(40, 32, generator=rng(seed)).double() for seed in range(3)]


def remote(formula):
    torch.manual_seed(0)
    return nn.Sequential(Formula(formula), nn.Linear(32, 8)).double()


def assert_pruned_by(square_sum, name, dense, model, sparsity=0.5):
    def matrix(model):
        return next(layer for layer in find_layers(model).layers if layer.name == name).read()

    before = matrix(dense)
    after = matrix(model)
    keep = reference.keep_by_row(reference.array(before.abs() * square_sum.sqrt()), sparsity)
    assert ((after != 0).numpy() == keep).all(), name


@pytest.mark.parametrize("formula", [FORMULAS["all tokens"], FORMULAS["broadcast"], by_halves])
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_other_formulas(formula, allocation, set_minimum):
    set_minimum(1)
    model = remote(formula)
    dense = remote(formula)
    report = prune(model, BATCHES, sequential="none", allocation=allocation)
    layers = [layer for layer in report.layers if layer.siblings]

    # By halves, each expert gets every fourth token; else all of them.
    step = 4 if formula is by_halves else 1
    assert [layer.tokens for layer in layers] == [120 // step] * 8
    for expert, layer in enumerate(layers[:4]):
        tokens = torch.cat([batch[expert % step :: step] for batch in BATCHES])
        assert_pruned_by(tokens.square().sum(0), f"0.up_proj.{expert}", dense, model, layer.target)


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_products_that_are_not_recognized_leave_their_experts_dense(sequential):
    model = remote(by_copies)
    report = prune(model, BATCHES, sequential=sequential)
    assert [layer.name for layer in report.layers] == ["1"]
    assert [matrix.detail for matrix in report.skipped] == [
        "no calibration token was observed in any expert of the module"
    ] * 8
    assert [matrix.shape for matrix in report.skipped[::4]] == [(48, 32), (32, 48)]
    assert torch.equal(model[0].up_proj, remote(by_copies)[0].up_proj)
    assert any("no calibration token was observed in 8 layers" in note for note in report.notes)


# Of four experts: with all, as many tokens enter an expert as a mask has.
@pytest.mark.parametrize("used", [2, 4])
def test_padding_that_counts_is_noted(set_minimum, used):
    set_minimum(1)
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = used
    report = prune(model, batches_of("llama_padded"))
    assert {layer.note.partition(":")[0] for layer in report.layers if layer.siblings} == {
        "padding counted"
    }


# ---- few tokens


@pytest.mark.parametrize(("sequential", "minimum"), spread(SEQUENTIAL_CHOICES, [10_000, 1, 40]))
def test_experts_with_few_tokens_are_pruned_by_what_all_saw(sequential, minimum, set_minimum):
    set_minimum(minimum)
    model = starved()
    dense = deepcopy(model)
    batches = batches_of("mixtral")
    report = prune(model, batches, sequential=sequential)
    counts = {layer.name: layer.tokens for layer in report.layers if layer.siblings}
    assert len(counts) == 16
    assert counts["model.layers.0.mlp.experts.gate_up_proj.2"] == 0
    assert report.sparsity == 0.5
    assert not any("no calibration" in matrix.detail for matrix in report.skipped)

    few = {name for name, count in counts.items() if count < minimum}
    assert {layer.name for layer in report.layers if "few tokens" in layer.note} == few
    start = f"{len(few)} expert layers received fewer than {minimum} tokens"
    (note,) = [note for note in report.notes if note.startswith(start)]
    assert "with the statistics of all experts" in note

    if sequential != "none":
        return
    statistics = observed(dense, batches)
    for layer in find_layers(dense).layers:
        if layer.expert is None:
            continue
        family = [
            own
            for name, own in statistics.items()
            if name.rpartition(".")[0] == layer.siblings[:-2] and own.count
        ]
        summed = family if layer.name in few else [statistics[layer.name]]
        square_sum = sum(own.sums["square_sum"] for own in summed)
        assert_pruned_by(square_sum, layer.name, dense, model)


def test_experts_in_a_list_help_each_other(set_minimum):
    set_minimum(1)
    model = model_of("expert_list")
    batches = batches_of("expert_list")
    model.blocks[0].gate.bias.data[1] = -100
    dense = deepcopy(model)
    report = prune(model, batches)

    few = "few tokens: pruned with the statistics of all experts"
    assert {layer.name: layer.tokens for layer in report.layers if few in layer.note} == {
        "blocks.0.experts.1.up": 0,
        "blocks.0.experts.1.down": 0,
    }
    calls = calls_of(dense, [f"blocks.0.experts.{index}.up" for index in range(4)], batches)
    square_sum = torch.cat([x for each in calls.values() for (x,) in each]).square().sum(0)
    assert_pruned_by(square_sum, "blocks.0.experts.1.up", dense, model)
