"""Experts that saw few tokens are pruned by what all experts saw."""

import copy

import pytest
import torch
from support import reference
from support.experts import observed, starved
from support.pairwise import spread
from support.zoo import ZOO, run

from wanda_lightning import prune
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers


@pytest.mark.parametrize(("sequential", "minimum"), spread(SEQUENTIAL_CHOICES, [10_000, 1, 40]))
def test_experts_with_few_tokens_are_pruned_by_what_all_saw(sequential, minimum, monkeypatch):
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", minimum)
    model = starved()
    dense, batches = copy.deepcopy(model), ZOO["mixtral"].batches()
    report = prune(model, batches, sequential=sequential, progress=False)
    layers = [layer for layer in report.layers if layer.siblings]
    assert len(layers) == 16
    assert report.sparsity == 0.5
    assert not any("no calibration" in matrix.detail for matrix in report.skipped)
    counts = {layer.name: layer.tokens for layer in layers}
    assert counts["model.layers.0.mlp.experts.gate_up_proj.2"] == 0
    few = {name for name, count in counts.items() if count < minimum}
    assert {layer.name for layer in layers if "few tokens" in layer.note} == few
    note = next(note for note in report.notes if "experts received fewer" in note)
    assert note.startswith(f"{len(few)} experts received fewer than {minimum} tokens")
    if sequential == "none":
        own, _ = observed(dense, batches)
        for layer in find_layers(dense).layers:
            if layer.expert is None:
                continue
            family = [own[name] for name in own if name.rpartition(".")[0] == layer.siblings[:-2] and own[name].count]
            total = sum(part.sums["square_sum"] for part in family)
            sums = total if layer.name in few else own[layer.name].sums["square_sum"]
            keep = reference.keep_by_row(reference.array(layer.read().abs() * sums.sqrt()), 0.5)
            pruned = next(item for item in find_layers(model).layers if item.name == layer.name)
            assert ((pruned.read() != 0).numpy() == keep).all(), layer.name


def test_experts_in_a_list_help_each_other(monkeypatch):
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 1)
    model = ZOO["expert_list"].build()
    with torch.no_grad():
        model.blocks[0].gate.bias[1] = -100
    dense = copy.deepcopy(model)
    report = prune(model, ZOO["expert_list"].batches(), progress=False)
    few = "few tokens: pruned with the statistics of all experts"
    helped = {layer.name: layer.tokens for layer in report.layers if few in layer.note}
    assert helped == {"blocks.0.experts.1.up": 0, "blocks.0.experts.1.down": 0}
    seen = []
    for index in (0, 2, 3):
        dense.blocks[0].experts[index].up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in ZOO["expert_list"].batches():
            run(dense, batch)
    weight = dense.blocks[0].experts[1].up.weight.detach()
    keep = reference.keep_by_row(reference.array(weight.abs() * torch.cat(seen).square().sum(0).sqrt()), 0.5)
    assert ((model.blocks[0].experts[1].up.weight != 0).numpy() == keep).all()


def test_alone_at_a_unit_an_expert_keeps_what_it_saw(monkeypatch):
    """At sequential "layer" each layer of a list of experts is a unit, and its siblings are not known."""
    monkeypatch.setattr("wanda_lightning.calibration.pooling.MIN_EXPERT_TOKENS", 10_000)
    options = {"sequential": "layer", "progress": False}
    report = prune(ZOO["expert_list"].build(), ZOO["expert_list"].batches(), **options)
    assert not any("few tokens" in layer.note for layer in report.layers)
