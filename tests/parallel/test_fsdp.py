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


@pytest.mark.parametrize(("sequential", "pattern"), spread(["block", "none"], ["unstructured", "2:4"]))
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


@pytest.mark.parametrize(
    ("name", "shares", "choices"),
    [
        ("llama", None, {"method": "balanced"}),
        ("llama", ((), (0, 1)), {"method": "best"}),
        ("few_rows", None, {"method": "best"}),  # biases; a process without a row
        pytest.param(
            "llama",
            None,
            {"method": "sparsegpt", "allocation": "owl"},
            marks=pytest.mark.nightly,
        ),
        ("llama", None, {"criterion": "ria", "pattern": "unstructured_layer", "allocation": "owl_layer"}),
        pytest.param("few_rows", None, {"method": "sparsegpt", "pattern": "equal_share"}, marks=pytest.mark.nightly),
        pytest.param(
            "few_rows", None, {"method": "admm", "pattern": "2:4", "sequential": "none"}, marks=pytest.mark.nightly
        ),
        pytest.param("convnext", None, {"method": "best"}, marks=pytest.mark.nightly),  # convolutions
        pytest.param("convnext", None, {"method": "best", "sequential": "none"}, marks=pytest.mark.nightly),
        pytest.param("block_twice", None, {"method": "balanced"}, marks=pytest.mark.nightly),
        pytest.param("expert_list", None, {"method": "best"}, marks=pytest.mark.nightly),
    ],
)
def test_choices_that_compare_rows(pair, name, shares, choices):
    choices = {"sequential": "block", **choices}  # "one_pass" would be "layer" in one process
    check_sharded(pair.run(cases.sharded, name, shares, wide=True, **choices), name, wide=True, **choices)


@pytest.mark.parametrize(
    ("name", "sequential"),
    [
        *spread(["mixtral", "gpt2"], ["none", "block"]),
        pytest.param("gpt_oss", "block", marks=pytest.mark.nightly),
    ],
)
def test_experts_and_layers_by_columns_are_gathered(pair, name, sequential):
    choices = {"method": "best", "sequential": sequential}
    check_sharded(pair.run(cases.sharded, name, wide=True, **choices), name, wide=True, **choices)


@pytest.mark.parametrize(
    ("case", "choices"),
    [
        ({"columns": True}, {"pattern": "2:4"}),
        ({}, {"criterion": "magnitude", "pattern": Unstructured("row"), "sequential": "layer"}),  # needs no forward
        pytest.param({"compiled": True}, {}, marks=pytest.mark.nightly),
    ],
)
def test_other_layouts_and_compiled_blocks(pair, case, choices):
    check_sharded(pair.run(cases.sharded, "llama", **case, **choices), "llama", **choices)


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
        ("reconstruct", "llama", r"recovery=Reconstruct\(\) .*DistillFromDense"),
        ("thorough", "llama", r"recovery=Distil\(\) .*DistillFromDense"),
        ("root_only", "llama", r"manages model.layers.0.self_attn.q_proj as a part of the whole model.*skip=\["),
        (
            "layer",
            "llama",
            r"sequential='layer' stops at model.layers.0.self_attn.q_proj.* sequential='block' or 'none'",
        ),
        ("two_dimensions", "llama", "not over one group of processes"),
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
