"""What pages show of a report, compared with plain loops over the layers of pruned models."""

import pytest
from support.reports import llama_report
from support.zoo import ZOO

from wanda_lightning import prune
from wanda_lightning.report import facts


def pruned(name, **choices):
    specimen = ZOO[name]
    model = specimen.build()
    return model, prune(model, specimen.batches(), 0.5, progress=False, **choices)


def test_values_by_kind_and_block():
    _, report = pruned("llama", method="sparsegpt", allocation="owl")
    by_name = {layer.name: layer for layer in report.layers}
    sparsity, errors = facts.sparsity_grid(report), facts.error_grid(report)
    assert sparsity.blocks == errors.blocks == ("model.layers.0", "model.layers.1")
    assert len(sparsity.kinds) * len(sparsity.blocks) == len(by_name)
    for kind, zeros, error in zip(sparsity.kinds, sparsity.values, errors.values, strict=True):
        layers = [by_name[f"{block}.{kind}"] for block in sparsity.blocks]
        assert zeros == pytest.approx([layer.sparsity for layer in layers])
        assert error == pytest.approx(tuple(layer.error for layer in layers))
    assert sparsity.labels == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_experts_of_a_block_are_one_kind():
    _, report = pruned("mixtral")
    grid = facts.sparsity_grid(report)
    experts = [layer for layer in report.layers if layer.siblings]
    kinds = {layer.siblings.removeprefix(f"{layer.block}.") for layer in experts}
    assert {kind for kind in grid.kinds if "*" in kind} == kinds
    found = facts.expert_tokens(report)
    assert [each.name for each in found] == list(grid.blocks)
    for each in found:
        tokens = [layer.tokens for layer in experts if layer.block == each.name]
        assert (each.experts, each.least, each.most) == (len(tokens), min(tokens), max(tokens))
        assert each.pooled == sum(
            "statistics of all experts" in layer.note for layer in experts if layer.block == each.name
        )


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_counted_once(name):
    model, report = pruned(name)
    found = facts.weights_by_kind(report)
    assert sum(each.size for each in found) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(each.zeros for each in found) == sum(layer.zeros for layer in report.layers)
    assert len({each.name for each in found}) == len(found) <= 14
    assert sum(len(group.matrices) for group in facts.dense_by_reason(report)) == len(report.skipped)
    grid = facts.sparsity_grid(report)
    assert len(set(grid.labels)) == len(grid.kinds)
    assert all(kind.replace(".*", "").endswith(label) for kind, label in zip(grid.kinds, grid.labels, strict=True))


def test_parts_that_were_trained():
    _, report = pruned("llama", recovery="reconstruct")
    grid = facts.part_grid(report)
    assert grid.kinds == ("self_attn before", "self_attn after", "mlp before", "mlp after")
    for block, *values in zip(grid.blocks, *grid.values, strict=True):
        parts = [
            next(layer.part for layer in report.layers if layer.name.startswith(f"{block}.{name}"))
            for name in ("self_attn", "mlp")
        ]
        assert values == [error for part in parts for error in (part.before, part.after)]


def test_lists_of_blocks_are_told_apart():
    _, report = pruned("t5")
    stacks = facts.sparsity_grid(report).stacks
    assert list(stacks) == ["encoder.block", "decoder.block"]
    assert list(stacks.values()) == [
        0,
        sum(block.startswith("encoder") for block in facts.sparsity_grid(report).blocks),
    ]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "Wanda (unstructured)"),
        ({"method": "sparsegpt", "pattern": "2:4"}, "SparseGPT (2:4)"),
        (
            {"method": "magnitude", "allocation": "owl", "pattern": "equal_share"},
            "Magnitude (equal share of the scores, OWL)",
        ),
        ({"method": "best"}, "best (ADMM, unstructured, Fisher)"),
        ({"method": "best", "pattern": "2:4"}, "best (ADMM, 2:4, permuted)"),
        ({"method": "best", "allocation": "uniform"}, "ADMM (unstructured)"),
    ],
)
def test_methods_in_words(choices, words):
    _, report = pruned("llama", **choices)
    assert facts.method_in_words(report.config) == words


def test_a_method_with_a_recovery_in_words():
    assert facts.method_in_words(llama_report(1).config) == "SparseGPT (unstructured, Fisher, Distil)"
    assert facts.method_in_words({}) == ""
