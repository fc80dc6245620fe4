"""Experts that are one parameter are pruned like the same experts as layers of their own."""

import copy

import pytest
import torch
from support.experts import SPECIMENS, double, experts_of, starved
from support.pairwise import spread, with_nightly
from support.zoo import ZOO, run
from torch import nn

from wanda_lightning import ADMM, PruningReport, Reconstruct, prune
from wanda_lightning.core import statistics
from wanda_lightning.evaluation import sparsity_of
from wanda_lightning.models import find_layers
from wanda_lightning.training.held_zeros import HeldZeros, zeros_of


class Unstacked(nn.Module):
    """What a module of experts computes, each matrix in a layer of its own; inside nothing is shared with it."""

    def __init__(self, experts):
        super().__init__()
        self.experts = nn.ModuleList(nn.Module() for _ in range(4))
        self.act, self.gate = getattr(experts, "act_fn", None), experts._apply_gate
        for index, expert in enumerate(self.experts):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(experts, name)[index].detach().clone()
                bias = getattr(experts, f"{name}_bias", None)
                weight = weight if bias is None else weight.T.contiguous()
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
                layer.weight = nn.Parameter(weight)
                if bias is not None:
                    layer.bias = nn.Parameter(bias[index].detach().clone())
                setattr(expert, name, layer)

    def forward(self, x, chosen, weights):
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, places = (chosen == index).nonzero(as_tuple=True)
            if len(rows):
                output = expert.down_proj(self.gate(expert.gate_up_proj(x[rows])))
                result = result.index_add(0, rows, output * weights[rows, places, None])
        return result


def unstacked(model):
    model = copy.deepcopy(model)
    for name, module in experts_of(model).items():
        model.set_submodule(name, Unstacked(module))
    return model


CHOICES = {
    "sparsegpt": {"solver": "sparsegpt"},
    "admm": {"solver": ADMM(iterations=2, refit_steps=1)},
    "ria": {"criterion": "ria"},
    "two_of_four": {"pattern": "2:4"},
    "layer": {"pattern": "unstructured_layer"},
    "owl": {"allocation": "owl"},
    "alpha": {"allocation": "alpha"},
    "fisher": {"allocation": "fisher"},
    "model": {"sequential": "none"},
}


@pytest.mark.parametrize(("name", "choices"), spread(["mixtral", "gpt_oss"], CHOICES))
def test_pruned_like_layers_of_their_own(name, choices, monkeypatch):
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 0)
    model, choices = double(name), CHOICES[choices]
    layers, batches = unstacked(model), ZOO[name].batches()
    torch.testing.assert_close(run(model, batches[0]), run(layers, batches[0]))
    report = prune(model, batches, progress=False, **choices)
    expected = prune(layers, batches, progress=False, **choices)
    assert report.sparsity == pytest.approx(expected.sparsity)
    assert len(report.layers) == len(expected.layers)
    others = {layer.name: layer for layer in find_layers(layers).layers}
    for layer in find_layers(model).layers:
        module, _, expert = layer.name.rpartition(".experts.")
        parameter, _, number = expert.rpartition(".")
        other = others[f"{module}.experts.experts.{number}.{parameter}" if layer.expert is not None else layer.name]
        assert torch.equal(layer.read() == 0, other.read() == 0), layer.name
        torch.testing.assert_close(layer.read(), other.read(), rtol=1e-8, atol=1e-10)


def test_reconstruct_trains_experts_but_those_left_dense():
    model, masks_alone = ZOO["mixtral"].build(), ZOO["mixtral"].build()
    dense, batches = copy.deepcopy(model), ZOO["mixtral"].batches() * 2
    skipped = "model.layers.0.mlp.experts.down_proj.1"
    report = prune(model, batches, recovery=Reconstruct(), skip=[skipped], progress=False)
    prune(masks_alone, batches, skip=[skipped], progress=False)
    first, others = experts_of(model), experts_of(masks_alone)
    experts, other = first["model.layers.0.mlp.experts"], others["model.layers.0.mlp.experts"]
    assert torch.equal(experts.gate_up_proj == 0, other.gate_up_proj == 0)
    assert not torch.equal(experts.gate_up_proj, other.gate_up_proj)
    kept = dict(dense.named_modules())["model.layers.0.mlp.experts"].down_proj
    assert [torch.equal(experts.down_proj[e], kept[e]) for e in range(4)] == [False, True, False, False]
    parts = {layer.name: layer.part for layer in report.layers}
    part = parts["model.layers.0.mlp.experts.gate_up_proj.0"]
    assert part.after < 0.7 * part.before


@pytest.mark.parametrize("arranged", [copy.deepcopy, unstacked])
def test_experts_with_the_same_statistics_factorize_them_once(monkeypatch, arranged):
    factorized, compute = [], statistics.inverse_factor
    monkeypatch.setattr(
        statistics, "inverse_factor", lambda gram, dampening: (factorized.append(gram), compute(gram, dampening))[1]
    )
    model, batches = arranged(ZOO["mixtral"].build()), ZOO["mixtral"].batches()
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 10**9)
    report = prune(model, batches, method="sparsegpt", progress=False)
    assert sum("few tokens" in layer.note for layer in report.layers) == 2 * 2 * 4  # blocks, matrices, experts
    # In each block, queries, keys and values share a factor; the rest is one for o_proj, gate_up_proj and down_proj.
    assert len(factorized) == 2 * 4


@pytest.mark.parametrize("name", with_nightly(["mixtral", "gpt_oss", "llama4"], SPECIMENS))
def test_the_state_dict_is_as_before(name):
    model = ZOO[name].build()
    before = {key: (value.shape, value.dtype, value.data_ptr()) for key, value in model.state_dict().items()}
    prune(model, ZOO[name].batches(), progress=False)
    assert {key: (v.shape, v.dtype, v.data_ptr()) for key, v in model.state_dict().items()} == before
    assert all(run(model, batch).isfinite().all() for batch in ZOO[name].batches())


def test_totals_count_each_parameter_once():
    model = ZOO["mixtral"].build()
    skip = ["model.layers.0.mlp.experts.down_proj.1"]
    report = prune(model, ZOO["mixtral"].batches(), skip=skip, progress=False)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.zeros == sum(int((p == 0).sum()) for p in model.parameters())
    inside = sum(layer.size for layer in find_layers(model, skip=skip).layers)
    assert report.coverage == pytest.approx(inside / report.parameters)
    assert sparsity_of(model)["model"] == pytest.approx(report.zeros / report.parameters)
    everything = sum(layer.size for layer in find_layers(model).layers)
    assert sparsity_of(model)["layers"] == pytest.approx(report.zeros / everything)


def test_the_table_has_one_row_for_all_experts_of_a_module(monkeypatch):
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 0)
    report = prune(starved(), ZOO["mixtral"].batches(), progress=False)
    assert PruningReport.from_json(report.to_json()) == report
    table = str(report).splitlines()
    rows = [index for index, line in enumerate(table) if "experts.gate_up_proj.*" in line]
    assert len(rows) == 2
    assert not any("gate_up_proj.0" in line for line in table)
    (first,) = (" ".join(table[rows[0] : rows[0] + 5]).split(),)
    assert "experts;" in first
    assert "1 of them: few tokens" in " ".join(first)
    tokens = sorted(layer.tokens for layer in report.layers if layer.name.startswith("model.layers.0.mlp.experts.gate"))
    assert f"{tokens[0]} - {tokens[-1]}" in " ".join(first)


def test_zeros_of_some_experts_are_held_in_training():
    model = ZOO["mixtral"].build()
    report = prune(model, ZOO["mixtral"].batches(), skip=["*.down_proj.1"], progress=False)
    counts = zeros_of(model)
    assert counts["model.layers.0.mlp.experts.down_proj.1"] == 0
    assert all(counts[layer.name] == layer.zeros for layer in report.layers)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 0, :5] = 0  # by chance, in an expert that is not pruned
    zero = {name: p == 0 for name, p in model.named_parameters()}
    held = HeldZeros()
    held.hold(model, [layer.name for layer in report.layers])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for batch in ZOO["mixtral"].batches():
        optimizer.zero_grad()
        run(model, batch).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            expected = zero[name].clone()
            if name == "model.layers.0.mlp.experts.down_proj":
                expected[1] = False
            assert torch.equal(parameter == 0, expected), name
    with torch.no_grad():  # a weight that passes zero: the state says that it is not held
        alive = (model.model.layers[1].mlp.experts.down_proj[2] != 0).nonzero()[0]
        model.model.layers[1].mlp.experts.down_proj[2, alive[0], alive[1]] = 0
    state = held.unheld_zeros()
    assert state.keys() == {"model.layers.1.mlp.experts.down_proj.2"}
    held.release()
    again = HeldZeros()
    again.load(state)
    again.hold(model, [layer.name for layer in report.layers])
    assert again.unheld_zeros().keys() == state.keys()
    again.release()
