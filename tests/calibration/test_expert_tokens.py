"""Tokens of experts: against routing by hand, and whatever formula multiplies them."""

import copy

import pytest
import torch
from support import reference
from support.experts import SPECIMENS, Stack, double, experts_of, jetmoe, observed, routed_tokens
from support.pairwise import spread
from support.zoo import ZOO, run
from torch import nn
from torch.nn import functional as F

from wanda_lightning import prune
from wanda_lightning.methods import SEQUENTIAL_CHOICES


def by_hand(model, batches):
    """The tokens routed to each expert's matrix by the model's own router, without padding, one by one."""
    found = {}
    for batch in batches:
        mask = batch.get("attention_mask")
        real = None if mask is None else mask.flatten().bool().numpy()

        def route(module, args, name, real=real):
            for (parameter, expert), (tokens, rows) in routed_tokens(module, *args).items():
                kept = tokens if real is None else tokens[real[rows]]
                found.setdefault(f"{name}.{parameter}.{expert}", []).extend(kept)

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: route(module, args, name))
            for name, module in experts_of(model).items()
        ]
        with torch.no_grad():
            run(model, batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.tensor([list(token) for token in tokens]) for name, tokens in found.items() if tokens}


@pytest.mark.parametrize("name", SPECIMENS)
def test_statistics_are_of_the_tokens_routed_to_each_expert(name):
    model, batches = double(name), [*ZOO[name].batches(), *ZOO["llama_padded"].batches()]
    expected = by_hand(model, batches)
    found, observer = observed(model, batches)
    assert found.keys() >= expected.keys()
    for expert, tokens in expected.items():
        assert found[expert].count == len(tokens), expert
        torch.testing.assert_close(found[expert].sums["square_sum"], tokens.square().sum(0))
        torch.testing.assert_close(found[expert].sums["gram"], tokens.T @ tokens)
    assert all(not found[expert].count for expert in found.keys() - expected.keys())
    assert not any(".experts." in expert for expert in observer.padding_counted | observer.not_routed)


@pytest.mark.parametrize(("sequential", "implementation"), spread(SEQUENTIAL_CHOICES, ["grouped_mm", "batched_mm"]))
def test_whatever_the_model_multiplies_by(sequential, implementation):
    reports, weights = [], []
    for chosen in ("eager", implementation):
        model = ZOO["mixtral"].build()
        model.set_experts_implementation(chosen)
        reports.append(prune(model, ZOO["mixtral"].batches(), sequential=sequential, progress=False))
        weights.append(model.state_dict())
        assert model.config._experts_implementation == chosen
        assert all(module.config._experts_implementation == chosen for module in experts_of(model).values())
    assert reports[0].layers == reports[1].layers
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_the_implementation_is_put_back_after_an_error(sequential):
    model, seen = ZOO["qwen3_moe"].build(), []

    def forward(batch):
        seen.append(model.config._experts_implementation)
        model(**batch)
        raise OSError("no more disk")

    model.set_experts_implementation("batched_mm")
    granularities = {"sequential": sequential, "progress": False}
    with pytest.raises(OSError, match="no more disk"):
        prune(model, ZOO["qwen3_moe"].batches(), forward=forward, allocation="owl", **granularities)
    assert set(seen) == {"eager"}
    assert model.config._experts_implementation == "batched_mm"


class Formula(Stack):
    """Experts of remote code, by a formula of its own."""

    def __init__(self, formula):
        super().__init__(num_experts=4, hidden_size=32)
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


def all_tokens(self, x):
    return torch.bmm(torch.bmm(x.expand(4, -1, -1), self.up_proj.mT).relu(), self.down_proj.mT).mean(0)


def broadcast(self, x):
    return ((x[None] @ self.up_proj.transpose(1, 2)).relu() @ self.down_proj.transpose(1, 2)).mean(0)


def by_halves(self, x):
    """The rows of an expert in two pieces."""
    parts = []
    for expert in range(4):
        first, second = self.up_proj[expert].chunk(2)
        hidden = torch.cat([F.linear(x[expert::4], first), x[expert::4].matmul(second.T)], dim=-1)
        parts.append(torch.mm(hidden.relu(), self.down_proj[expert].t()))
    return torch.cat(parts)


def by_copies(self, x):
    chosen = torch.arange(len(x)) % 4
    hidden = torch.bmm(self.up_proj[chosen], x[:, :, None]).relu()
    return torch.bmm(self.down_proj[chosen], hidden)[:, :, 0]


def some_vectors():
    return [torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize(("formula", "tokens"), [(all_tokens, 120), (broadcast, 120), (by_halves, 30)])
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_other_formulas(formula, tokens, allocation, monkeypatch):
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 0)
    torch.manual_seed(0)
    model = nn.Sequential(Formula(formula), nn.Linear(32, 8)).double()
    dense, batches = copy.deepcopy(model), [x.double() for x in some_vectors()]
    options = {"sequential": "none", "allocation": allocation}
    report = prune(model, batches, progress=False, **options)
    layers = [layer for layer in report.layers if layer.siblings]
    assert [layer.tokens for layer in layers] == [tokens] * 8
    everything = formula is not by_halves
    assert all(("every token counted" in layer.note) == everything for layer in layers)
    for expert in range(4):
        x = torch.cat([x if everything else x[expert::4] for x in batches])
        weight = dense[0].up_proj[expert].detach()
        target = next(layer.target for layer in layers if layer.name == f"0.up_proj.{expert}")
        keep = reference.keep_by_row(reference.array(weight.abs() * x.square().sum(0).sqrt()), target)
        assert ((model[0].up_proj[expert] != 0).numpy() == keep).all()


def test_the_fisher_information_of_pieces_is_that_of_the_whole():
    torch.manual_seed(0)
    pieces = nn.Sequential(Formula(by_halves), nn.Linear(32, 8))
    experts = pieces[0]

    def whole(self, x):
        parts = [F.linear(F.linear(x[e::4], self.up_proj[e]).relu(), self.down_proj[e]) for e in range(4)]
        return torch.cat(parts)

    other = copy.deepcopy(pieces)
    other[0].formula = whole
    assert experts is not other[0]
    targets = [
        [layer.target for layer in prune(m, some_vectors(), 0.5, allocation="fisher", progress=False).layers]
        for m in (pieces, other)
    ]
    assert targets[0] == targets[1]
    assert len(set(targets[0])) > 1


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_products_that_are_not_recognized_leave_their_experts_dense(sequential):
    torch.manual_seed(0)
    model = nn.Sequential(Formula(by_copies), nn.Linear(32, 8))
    dense = copy.deepcopy(model)
    report = prune(model, some_vectors(), sequential=sequential, progress=False)
    assert [layer.name for layer in report.layers] == ["1"]
    reason = "no calibration token was observed in any expert of the module"
    assert [matrix.detail for matrix in report.skipped] == [reason] * 8
    assert [matrix.shape for matrix in report.skipped[::4]] == [(48, 32), (32, 48)]
    assert torch.equal(model[0].up_proj, dense[0].up_proj)
    assert any("no calibration token was observed in 8 layers" in note for note in report.notes)


def test_padding_that_counts_is_noted(monkeypatch):
    """JetMoE sorts its tokens outside of its experts."""
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 0)
    torch.manual_seed(0)
    batches = [{key: value % 64 for key, value in batch.items()} for batch in ZOO["llama_padded"].batches()]
    report = prune(jetmoe().eval(), batches, progress=False)
    notes = {layer.note.partition(":")[0] for layer in report.layers if layer.siblings}
    assert notes == {"padding counted"}
