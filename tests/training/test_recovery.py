"""What every recovery promises: zeros stay, nothing else changes, and small steps in few bits are not lost."""

import pytest
import torch
from support.pairwise import with_nightly
from support.quiet import prune
from support.recoveries import IntoItsDtype, blocks, pruned_with_and_without, some_batches
from support.zoo import batches_of, model_of
from torch import nn

from wanda_lightning import Distill, Reconstruct
from wanda_lightning.models import find_layers

RECOVERIES = {"distill": Distill(passes=1), "reconstruct": Reconstruct()}
DISTILLED = ("llama_padded", "mixtral")
RECONSTRUCTED = ("t5", "vit", "opt", "resnet18")
SAMPLE = [("distill", name, "zero_out") for name in DISTILLED]
for name, solver in zip(RECONSTRUCTED, ("zero_out", "sparsegpt") * 2, strict=True):
    SAMPLE.append(("reconstruct", name, solver))
MORE = [("distill", name, "zero_out") for name in ("llama", "gemma2", "gpt_oss", "t5", "vit")]


@pytest.mark.parametrize(("recovery", "name", "solver"), with_nightly(SAMPLE, MORE))
def test_only_kept_weights_move_and_nothing_is_left_behind(recovery, name, solver):
    """And in the whole model, with `Distill`, vectors."""
    dense = model_of(name)
    batches = batches_of(name) * 2
    hooks = sum(len(module._forward_hooks) for module in dense.modules())
    start, model, report = pruned_with_and_without(
        dense, batches, recovery=RECOVERIES[recovery], solver=solver
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.03) or solver == "sparsegpt"

    layers = find_layers(model).layers
    pruned = {layer.parameter for layer in layers}
    # `Reconstruct` changes the inputs of later blocks, and so their masks.
    same_masks = pruned
    if recovery == "reconstruct":
        same_masks = {layer.parameter for layer in find_layers(model).stops[0].layers}
    moved = 0
    for key, after in model.named_parameters():
        before = start.get_parameter(key)
        if after in same_masks:
            assert torch.equal(before == 0, after == 0), key
            moved += int((before != after).sum())
        trains = after in pruned or (after.ndim < 2 and recovery == "distill")
        assert trains or torch.equal(before, after), key
        assert after.requires_grad
        assert after.grad is None
    # The first block of resnet18 has too few tokens: SparseGPT has learned all of them.
    assert moved > 0 or (name, solver) == ("resnet18", "sparsegpt")
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())

    parts = [layer.part for layer in report.layers if layer.part]
    assert all(part.after <= part.before for part in parts)
    assert bool(parts) == (recovery == "reconstruct")


@pytest.mark.parametrize(
    "recovery", [Distill(passes=30, batch_size=16, learning_rate=1e-3), Reconstruct(10, 1e-3)]
)
def test_bfloat16_weights_have_masters(recovery):
    """Steps that bfloat16 would round away add up."""
    start, model, _ = pruned_with_and_without(
        blocks(torch.bfloat16), some_batches(4, torch.bfloat16), recovery=recovery
    )
    weight = model[0].mlp[0].weight
    before = start[0].mlp[0].weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight == 0, before == 0)
    assert (weight != before).sum() > 0.3 * (before != 0).sum()


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize(
    ("last", "dtype"), [(nn.Linear, torch.bfloat16), (IntoItsDtype, torch.float32)]
)
def test_a_model_runs_in_bfloat16_if_it_can(monkeypatch, recovery, last, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    model = blocks(torch.float32)
    for block in model:
        block.mlp.append(last(8, 8))
    runs = set()
    first = model[0].mlp[0]
    first.register_forward_hook(
        lambda module, args, output: runs.add((output.dtype, torch.is_grad_enabled()))
    )
    report = prune(model, some_batches(8, torch.float32), recovery=recovery)
    assert {(dtype, False), (dtype, True)} <= runs  # held out and in training
    assert first.weight.dtype == torch.float32
    if recovery == "distill":
        losses = report.training.passes
        assert losses[-1].held_out < losses[0].held_out
    else:
        assert all(layer.part.after < layer.part.before for layer in report.layers)
