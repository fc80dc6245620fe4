"""Experts that are one parameter are pruned like the same experts as layers of their own."""

import copy

import pytest
import torch
from support.experts import experts_of
from support.zoo import ZOO, run

from wanda_lightning import Reconstruct, prune
from wanda_lightning.core import statistics
from wanda_lightning.evaluation import sparsity_of
from wanda_lightning.models import find_layers
from wanda_lightning.training.held_zeros import HeldZeros, zeros_of


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


def test_experts_with_the_same_statistics_factorize_them_once(monkeypatch):
    factorized, compute = [], statistics.inverse_factor
    monkeypatch.setattr(
        statistics, "inverse_factor", lambda gram, dampening: (factorized.append(gram), compute(gram, dampening))[1]
    )
    model, batches = ZOO["mixtral"].build(), ZOO["mixtral"].batches()
    monkeypatch.setattr("wanda_lightning.calibration.observer.MIN_EXPERT_TOKENS", 10**9)
    report = prune(model, batches, method="sparsegpt", progress=False)
    assert sum("few tokens" in layer.note for layer in report.layers) == 2 * 2 * 4  # blocks, matrices, experts
    # In each block, queries, keys and values share a factor; the rest is one for o_proj, gate_up_proj and down_proj.
    assert len(factorized) == 2 * 4


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


def test_zeros_of_some_experts_are_held_in_training():
    model = ZOO["mixtral"].build()
    report = prune(model, ZOO["mixtral"].batches(), skip=["*.down_proj.1"], progress=False)
    counts, names = zeros_of(model), [layer.name for layer in report.layers]
    assert counts["model.layers.0.mlp.experts.down_proj.1"] == 0
    assert all(counts[layer.name] == layer.zeros for layer in report.layers)
    model.set_experts_implementation("eager")
    first, second = (layer.mlp.experts.down_proj for layer in model.model.layers)
    with torch.no_grad():
        first[1, 0, :5] = 0  # by chance, in an expert that is not pruned
    held, zero = HeldZeros(), {name: p == 0 for name, p in model.named_parameters() if "experts" in name}
    held.hold(model, names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    run(model, ZOO["mixtral"].batches()[0]).square().mean().backward()
    optimizer.step()
    zero["model.layers.0.mlp.experts.down_proj"][1] = False
    assert all(torch.equal(model.get_parameter(name) == 0, expected) for name, expected in zero.items())
    with torch.no_grad():  # a weight that passes zero: the state says that it is not held
        second[2][tuple((second[2] != 0).nonzero()[0])] = 0
    state = held.unheld_zeros()
    assert state.keys() == {"model.layers.1.mlp.experts.down_proj.2"}
    held.release()
    again = HeldZeros()
    again.load(state)
    again.hold(model, names)
    assert again.unheld_zeros().keys() == state.keys()
    again.release()
