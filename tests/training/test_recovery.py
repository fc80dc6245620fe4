"""What every recovery promises: zeros stay, nothing else changes, and small steps in few bits are not lost."""

import copy

import pytest
import torch
from support.pairwise import with_nightly
from support.recoveries import IntoItsDtype, blocks, pruned_with_and_without, some_batches
from support.zoo import ZOO
from torch import nn

from wanda_lightning import Distill, Reconstruct, prune
from wanda_lightning.models import find_layers
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.training.masked_weights import LARGEST_SCALE, MaskedWeights

RECOVERIES = {"distill": Distill(passes=1), "reconstruct": Reconstruct()}
NAMES = "llama_padded", "opt", "gpt2", "t5", "vit", "resnet18", "convnext", "swin"
LANGUAGE = [("distill", name, "zero_out") for name in ("llama_padded", "mixtral", "opt", "t5")]
SAMPLE = [
    *LANGUAGE,
    *(("reconstruct", *each) for each in zip(NAMES, ("zero_out", "sparsegpt") * 4, strict=True)),
]


@pytest.mark.parametrize(
    ("recovery", "name", "solver"),
    with_nightly(
        SAMPLE,
        [("distill", name, "zero_out") for name in ("llama", "gemma2", "gpt2", "gpt_oss", "vit")],
    ),
)
def test_only_kept_weights_move_and_nothing_is_left_behind(recovery, name, solver):
    """And in the whole model, with `Distill`, vectors."""
    dense = ZOO[name].build()
    batches = ZOO[name].batches() * 2
    hooks = sum(len(module._forward_hooks) for module in dense.modules())
    start, model, report = pruned_with_and_without(
        dense, batches, recovery=RECOVERIES[recovery], solver=solver
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.03) or solver == "sparsegpt"
    first, *_ = find_layers(model).stops
    # Later blocks see other inputs.
    kept = find_layers(model).layers if recovery == "distill" else first.layers
    pruned = {id(layer.parameter) for layer in find_layers(model).layers}
    masks = {id(layer.parameter) for layer in kept}
    moved = 0
    for (key, before), (_, after) in zip(
        start.named_parameters(), model.named_parameters(), strict=True
    ):
        if id(after) in masks:
            assert torch.equal(before == 0, after == 0), key
            moved += int((before != after).sum())
        assert (
            id(after) in pruned
            or (after.ndim < 2 and recovery == "distill")
            or torch.equal(before, after)
        ), key
        assert after.requires_grad
        assert after.grad is None
    # Of its ten tokens SparseGPT has learned all.
    assert moved > 0 or (name, solver) == (
        "resnet18",
        "sparsegpt",
    )
    trained = [layer.part for layer in report.layers if layer.part]
    assert all(part.after <= part.before for part in trained)
    assert bool(trained) == (recovery == "reconstruct")
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "recovery", [Distill(passes=30, batch_size=16, learning_rate=1e-3), Reconstruct(10, 1e-3)]
)
def test_bfloat16_weights_have_masters(recovery):
    """Steps that bfloat16 would round away add up."""
    batches = some_batches(4, torch.bfloat16)
    start, model, _ = pruned_with_and_without(blocks(torch.bfloat16), batches, recovery=recovery)
    weight, before = model[0].mlp[0].weight, start[0].mlp[0].weight
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
    found = set()
    for block in model:
        block.mlp.append(last(8, 8))
    model[0].mlp[0].register_forward_hook(
        lambda *call: found.add((call[-1].dtype, torch.is_grad_enabled()))
    )
    report = prune(model, some_batches(8, torch.float32), recovery=recovery, progress=False)
    assert {(dtype, False), (dtype, True)} <= found  # held out and in training
    assert all(
        layer.part is None or layer.part.after < layer.part.before for layer in report.layers
    )
    assert (
        report.training is None
        or report.training.passes[-1].held_out < report.training.passes[0].held_out
    )
    assert model[0].mlp[0].weight.dtype == torch.float32


@pytest.mark.parametrize(("gain", "overflows"), [(2.0**-22, False), (2.0**12, True)])
def test_gradients_in_float16_neither_vanish_nor_overflow(gain, overflows):
    torch.manual_seed(0)
    half, x, found = nn.Linear(8, 16).half(), torch.randn(4, 8).half(), []
    wide = copy.deepcopy(half).float()
    scales = []

    def loss_of(model):
        def loss(samples, scale):
            scales.append(scale)
            for each in samples:
                y = (model(each).float() * gain).sum()
                y.backward(torch.full_like(y, scale))
                yield y.item()

        return loss

    for model, inputs in ((half, x), (wide, x.float())):
        with MaskedWeights(model, [model.weight], [], SINGLE_PROCESS) as weights:
            (group,) = weights.groups(1.0)
            optimizer = torch.optim.SGD([group])
            optimizer.register_step_pre_hook(
                lambda *_, group=group: found.append(group["params"][0].grad.clone())
            )
            weights.step(optimizer, inputs.split(2), loss_of(model))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(
        found[0], found[1], rtol=0.01, atol=0.01 * found[1].abs().max().item()
    )
    assert (min(scales) < LARGEST_SCALE) == overflows
