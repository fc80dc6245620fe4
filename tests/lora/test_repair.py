"""Adapters in closed form that make up for the errors of pruning."""

import copy

import pytest
import torch
from peft import PeftModel
from support.lora import TOKENS, gpt2, llama

from wanda_lightning import prune
from wanda_lightning.lora import repair

BATCHES = [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]


@pytest.fixture(params=[llama, gpt2])
def pair(request):
    """A pruned model, and its dense copy."""
    dense = request.param(sparsity=0).eval()
    pruned = copy.deepcopy(dense)
    prune(pruned, BATCHES, 0.5, progress=False)
    return pruned, dense


@torch.no_grad()
def distance(model, dense):
    return (model(input_ids=TOKENS).logits - dense(input_ids=TOKENS).logits).square().sum()


def test_it_is_the_nearest_product_of_this_rank(pair):
    pruned, dense = pair
    name = "model.layers.1.mlp.down_proj" if hasattr(pruned, "model") else "transformer.h.1.mlp.c_proj"
    transposed = hasattr(pruned, "transformer")
    rows = []
    hook = pruned.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    for batch in BATCHES:
        pruned(**batch)
    hook.remove()
    error = (dense.get_submodule(name).weight - pruned.get_submodule(name).weight).detach()
    x, error = torch.cat(rows).detach(), error if transposed else error.T  # (tokens, d_in), (d_in, d_out)
    outputs = x @ error
    singular = torch.linalg.svdvals(outputs.double())
    adapted = repair(pruned, dense, BATCHES, rank=4, progress=False)
    layer = adapted.base_model.model.get_submodule(name)
    left = outputs - x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(left.square().sum().double(), singular[4:].square().sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", ["refit", "balanced"])
def test_biases_that_pruning_has_fitted_count(method):
    """They make up for the mean of the error, which the adapters must not do again."""
    dense = gpt2(sparsity=0).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    pruned = copy.deepcopy(dense)
    prune(pruned, BATCHES, 0.5, method=method, progress=False)
    before = distance(pruned, dense)
    assert distance(repair(pruned, dense, BATCHES, rank=8, progress=False).eval(), dense) < before / 2


def test_more_rank_is_nearer_and_peft_loads_it_alone(pair, tmp_path):
    pruned, dense = pair
    found = [distance(pruned, dense)]
    for rank in (2, 8, 16):
        adapted = repair(copy.deepcopy(pruned), dense, BATCHES, rank=rank, progress=False).eval()
        found.append(distance(adapted, dense))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 4
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(pruned), tmp_path)
    assert again.peft_config["default"].peft_type == "LORA"
    assert distance(again, adapted) == 0


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("rank", "rank must be at most 16, the smaller side of model.layers.0.self_attn.k_proj, but it is 17."),
        ("zero", "rank must be at least 1, but it is 0"),
        ("same", "all its linear layers have the same weights as in dense"),
        ("wider", r"weight of shape \(56, 32\) in the pruned model and one of shape \(64, 32\) in the dense one"),
        ("other", "differ by more than their size"),
        ("elsewhere", "batches must reach at least one pruned linear layer"),
        ("batches", "batches must be a list of batches or a dataloader, but it is a NoneType.$"),
        ("padding", "at least one pruned linear layer, but no token except padding does"),
        ("none", "rank must be a whole number, but it is None"),
        ("number", "forward must be a function, but it is 3"),
        ("path", r"dense must be a torch.nn.Module, but it is a str. Call repair\(model, dense, batches\)."),
        ("meta", "dense must have finite weights, but model.layers.0.self_attn.q_proj is on the meta device"),
        ("nan", "dense must have finite weights, but model.layers.0.self_attn.q_proj has weights that are NaN or inf"),
    ],
)
def test_what_is_refused(case, text):
    dense = llama(sparsity=0).eval()
    pruned = copy.deepcopy(dense)
    prune(pruned, BATCHES, 0.5, progress=False)
    before = copy.deepcopy(pruned.state_dict())
    if case == "same":
        dense = pruned
    if case == "wider":
        dense = llama(sparsity=0, intermediate_size=64)
    if case == "other":
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.neg_()
    if case == "nan":
        dense.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    dense = {"path": "folder", "meta": copy.deepcopy(dense).to("meta")}.get(case, dense)
    rank = {"rank": 17, "zero": 0, "none": None}.get(case, 4)
    padding = [{"input_ids": TOKENS, "attention_mask": torch.zeros_like(TOKENS)}]
    batches = {"batches": None, "padding": padding}.get(case, BATCHES)
    forward = {"elsewhere": lambda _: None, "number": 3}.get(case)
    with pytest.raises(ValueError, match=text):
        repair(pruned, dense, batches, rank=rank, forward=forward, progress=False)
    after = pruned.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, but it is a NoneType"):
        repair(None, llama(), BATCHES)
