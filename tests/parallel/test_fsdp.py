"""A model that FSDP2 shards over two processes is pruned like the whole model in one process."""

import re

import pytest
import torch
from support import pair_cases as cases
from support.pair_checks import alone, assert_equal_everywhere, assert_same_report, assert_same_weights
from support.pairwise import spread
from support.zoo import ZOO, run
from torch import nn

from wanda_lightning import prune
from wanda_lightning.core.patterns import Unstructured


def check_sharded(results, name, **choices):
    (first, second), (model, expected) = results, alone(name, **choices)
    for found in (first, second):
        assert found["asleep"]
        assert not found["hooks"]
        assert_same_report(found["report"], expected)
        torch.testing.assert_close(found["output"], run(model, first_batch(name)).detach())
        assert_same_weights(found["weights"], dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, first_batch(name)).square().mean().backward()
    optimizer.step()
    for key, value in model.named_parameters():
        torch.testing.assert_close(first["trained"][key], value.detach(), msg=key)


def first_batch(name):
    return cases.vectors()[0] if name == "few_rows" else ZOO[name].batches()[0]


@pytest.mark.parametrize(("sequential", "pattern"), spread(["block", "none", "layer"], ["unstructured", "2:4"]))
def test_gathered_it_is_the_model_of_one_process(pair, sequential, pattern):
    choices = {"sequential": sequential, "pattern": pattern}
    check_sharded(pair.run(cases.sharded, "llama", **choices), "llama", **choices)


@pytest.mark.parametrize(
    ("name", "sequential"),
    [
        *spread(["convnext", "block_twice", "unreached", "few_rows"], ["none", "block"]),
        *(pytest.param(name, "block", marks=pytest.mark.nightly) for name in ("t5", "resnet18")),
    ],
)
def test_other_architectures_sharded(pair, name, sequential):
    choices = {"sequential": sequential, "keep_batch_norm": True}
    check_sharded(pair.run(cases.sharded, name, **choices), name, **choices)


SHARES = ((0, 1, 2, 3), ()), ((), (0, 1, 2, 3)), ((2,), (0, 1, 3))


@pytest.mark.parametrize(("sequential", "shares"), spread(["block", "none"], SHARES))
def test_uneven_and_empty_shares_sharded(pair, sequential, shares):
    check_sharded(pair.run(cases.sharded, "few_rows", shares, sequential=sequential), "few_rows", sequential=sequential)


@pytest.mark.nightly
def test_blocks_that_are_compiled(pair):
    check_sharded(pair.run(cases.sharded, "few_rows", compiled=True), "few_rows")


def test_magnitude_needs_no_forward_and_any_layout(pair):
    choices = {"criterion": "magnitude", "pattern": Unstructured("row"), "sequential": "layer"}
    check_sharded(pair.run(cases.sharded, "llama", **choices), "llama", **choices)


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
    ("case", "name", "text"),
    [
        ("structured", "llama", "pattern='structured' needs whole layers, but the model is sharded"),
        ("columns", "gpt2", r"transformer.h.0.attn.c_attn, a Conv1D, stores its weight by columns"),
        ("experts", "mixtral", r"experts .*gate_up_proj.* sharded across processes.*skip=\['\*.experts'\]"),
        ("root_only", "llama", r"manages model.layers.0.self_attn.q_proj as a part of the whole model.*skip=\["),
        ("second_dimension", "llama", r"model must be sharded by rows"),
        ("two_dimensions", "llama", r"model must be sharded by rows"),
        ("alone", "llama", r"is sharded across 2 processes and 1 prune"),
        ("outside", "llama", r"a module around it manages the weight"),
        ("outside_awake", "llama", r"a module around it manages the weight"),
    ],
)
def test_what_cannot_be_pruned_sharded(pair, case, name, text):
    dense = dict(ZOO[name].build().named_parameters())
    for error, weights in pair.run(cases.refused, case):
        assert error[0] == "UserError"
        assert re.search(text, error[1]), error[1]
        assert_same_weights(weights, dense, tolerance=0)


def test_a_model_that_routes_its_batches(pair):
    for error, _ in pair.run(cases.refused, "routed"):
        assert error[0] == "UserError"
        assert "do not call the same parts of the model" in error[1]
