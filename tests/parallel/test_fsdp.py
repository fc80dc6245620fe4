"""A model that FSDP2 shards over two processes is pruned like the whole model in one process."""

import re

import pytest
import torch
from support import pair_cases as cases
from support.pair_checks import alone, assert_equal_everywhere, assert_same_report, assert_same_weights
from support.pairwise import with_nightly
from support.zoo import ZOO, run
from torch import nn

from wanda_lightning import prune
from wanda_lightning.core.patterns import Unstructured


def check_sharded(results, name, wide=False, **choices):
    (first, second), (model, expected) = results, alone(name, wide=wide, **choices)
    batch = cases.specimen(name, wide)[1][0]
    for found in (first, second):
        assert found["asleep"]
        assert not found["hooks"]
        assert_same_report(found["report"], expected)
        torch.testing.assert_close(found["output"], run(model, batch).detach())
        if wide:
            assert_close_weights(found["weights"], dict(model.named_parameters()))
        else:
            assert_same_weights(found["weights"], dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, batch).square().mean().backward()
    optimizer.step()
    for key, value in model.named_parameters():
        torch.testing.assert_close(first["trained"][key], value.detach(), msg=key)


def assert_close_weights(weights, expected):
    """In float64 there are no near ties: the same zeros, and other weights that differ by rounding."""
    for name, value in expected.items():
        assert torch.equal(weights[name] == 0, value == 0), name
        torch.testing.assert_close(weights[name], value.detach(), rtol=1e-9, atol=1e-12, msg=name)


WIDE = {"wide": True}  # in float64: choices that compare rows, and experts and layers by columns, which are gathered
SAMPLE = [
    ("llama", {}, {"pattern": "unstructured"}),
    ("llama", {}, {"pattern": "2:4", "sequential": "none"}),
    *((name, {}, {}) for name in ("block_twice", "few_rows")),
    *((name, {}, {"sequential": "none"}) for name in ("convnext", "unreached")),
    ("few_rows", {"shares": ((0, 1, 2, 3), ())}, {}),
    ("few_rows", {"shares": ((), (0, 1, 2, 3))}, {"sequential": "none"}),
    ("few_rows", {"shares": ((2,), (0, 1, 3))}, {}),
    ("llama", WIDE, {"method": "balanced"}),
    ("llama", {"shares": ((), (0, 1)), **WIDE}, {"method": "best"}),
    ("few_rows", WIDE, {"method": "best"}),  # biases; a process without a row
    ("llama", WIDE, {"criterion": "ria", "pattern": "unstructured_layer", "allocation": "owl_layer"}),
    ("mixtral", WIDE, {"method": "best", "sequential": "none"}),
    ("gpt2", WIDE, {"method": "best"}),
    ("llama", {"columns": True}, {"pattern": "2:4"}),
    # No forward is needed.
    ("llama", {}, {"criterion": "magnitude", "pattern": Unstructured("row"), "sequential": "layer"}),
]
NIGHTLY = [
    *((name, {}, {}) for name in ("t5", "resnet18")),
    ("llama", WIDE, {"method": "sparsegpt", "allocation": "owl"}),
    ("few_rows", WIDE, {"method": "sparsegpt", "pattern": "equal_share"}),
    ("few_rows", WIDE, {"method": "admm", "pattern": "2:4", "sequential": "none"}),
    ("convnext", WIDE, {"method": "best", "sequential": "none"}),
    *((name, WIDE, {"method": "best"}) for name in ("convnext", "expert_list", "gpt_oss")),
    ("block_twice", WIDE, {"method": "balanced"}),
    ("llama", {"compiled": True}, {}),
]


@pytest.mark.parametrize(("name", "case", "choices"), with_nightly(SAMPLE, NIGHTLY))
def test_gathered_it_is_the_model_of_one_process(pair, name, case, choices):
    choices = {"sequential": "block", "keep_batch_norm": True, **choices}
    check_sharded(pair.run(cases.sharded, name, **case, **choices), name, "wide" in case, **choices)


def test_mixed_precision(pair):
    first, second = pair.run(cases.sharded, "few_rows", dtype=torch.bfloat16)
    model, expected = alone("few_rows")
    assert_equal_everywhere(first["weights"], second["weights"])
    assert_same_report(first["report"], expected)
    assert_same_weights(first["weights"], dict(model.named_parameters()), tolerance=0.05)  # inputs of blocks are bf16
    assert first["asleep"]


def test_parameters_that_are_not_sharded(pair):
    (first, report), (second, _) = pair.run(cases.evaluation_of_ignored)
    torch.manual_seed(0)
    model = nn.Sequential(cases.Block(), cases.Block())
    expected = prune(model, cases.vectors(), progress=False)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)


def test_an_error_leaves_all_at_rest(pair):
    model = ZOO["llama"].build()
    for error, asleep, unchanged, output in pair.run(cases.ends_early):
        assert error[0] == "OSError"
        assert asleep
        assert unchanged
        torch.testing.assert_close(output, run(model, ZOO["llama"].batches()[0]).detach())


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("structured", "pattern='structured' needs whole layers, but the model is sharded"),
        ("reconstruct", r"recovery=Reconstruct\(\) .*DistillFromDense"),
        ("thorough", r"recovery=Distil\(\) .*DistillFromDense"),
        ("root_only", r"manages model.layers.0.self_attn.q_proj as a part of the whole model.*skip=\["),
        ("layer", r"sequential='layer' stops at model.layers.0.self_attn.q_proj.* sequential='block' or 'none'"),
        ("two_dimensions", "not over one group of processes"),
        ("alone", r"is sharded across 2 processes and 1 prune"),
        *((case, r"a module around it manages the weight") for case in ("outside", "outside_awake")),
        ("routed", "do not call the same parts of the model"),
    ],
)
def test_what_cannot_be_pruned_sharded(pair, case, text):
    dense = dict(ZOO["llama"].build().named_parameters())
    for error, weights in pair.run(cases.refused, case):
        assert error[0] == "UserError"
        assert re.search(text, error[1]), error[1]
        if case != "routed":
            assert_same_weights(weights, dense, tolerance=0)
