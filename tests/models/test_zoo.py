"""What support/zoo.py promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.zoo import TOKENS, WINDOW, ZOO, Specimen, matching, matrices, run
from torch import nn

LAYERS = ("Linear", "Conv1D", "Conv2d", "NonDynamicallyQuantizableLinear")


def called(model: nn.Module, batch: Any) -> tuple[torch.Tensor, Counter[str]]:
    """Run a batch, with gradients, so that transformer layers are not fused, and count the calls of each module."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in model.named_modules()
    ]
    output = run(model, batch)
    for hook in hooks:
        hook.remove()
    return output, counts


def tensors(batch: Any) -> list[torch.Tensor]:
    return list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]


@pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO)
def test_a_specimen(specimen: Specimen):
    before = torch.get_rng_state()
    model, twin, batches = specimen.build(), specimen.build().state_dict(), specimen.batches()
    assert all(torch.equal(value, twin[name]) for name, value in model.state_dict().items())
    for batch, again in zip(batches, specimen.batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(again), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 2 <= len(batches) <= 3

    total: Counter[str] = Counter()
    for batch in batches:
        output, counts = called(model, batch)
        output.square().sum().backward()
        total += counts
        assert output.isfinite().all()
        assert 0.05 < output.std() < 10
        assert len(output) == len(tensors(batch)[0])
        with torch.no_grad():
            assert torch.equal(run(model, batch), run(model, batch))

    found, modules = matrices(model), dict(model.named_modules())
    for glob in (*specimen.dense, *specimen.uncalled, *specimen.read_past):
        assert matching(found, [glob]), glob
    for glob in specimen.blocks:
        assert len(matching(modules, [glob])) >= 2, glob
    used = {name for name, p in found.items() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert found.keys() - used <= matching(found, specimen.uncalled)
    layers = found.keys() - matching(found, specimen.dense)
    for name in layers:
        assert_fits_n_of_m(model, name, found[name])
    module_of = {name: name.rsplit(".", 2)[0] if found[name].ndim == 3 else name for name in layers}
    idle = {name for name in layers if not total[module_of[name]]}
    assert idle == matching(layers, [*specimen.uncalled, *specimen.read_past])
    for name in matching(modules, specimen.blocks):
        assert total[name] or matching([f"{name}.up"], specimen.uncalled), name


def assert_fits_n_of_m(model: nn.Module, name: str, weight: torch.Tensor):
    if weight.ndim == 3:
        assert all(width % 8 == 0 for width in weight.shape[1:]), name
        return
    layer = model.get_submodule(name)
    assert type(layer).__name__ in LAYERS, name
    d_in = layer.in_channels if isinstance(layer, nn.Conv2d) else getattr(layer, "in_features", weight.shape[0])
    assert d_in % 8 == 0, name


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_the_window_is_smaller_than_the_text(name: str):
    specimen = ZOO[name]
    narrow, wide = specimen.build(), specimen.build()
    assert narrow.config.sliding_window == WINDOW < TOKENS
    wide.config.sliding_window = TOKENS
    for module in wide.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = TOKENS
    batch = specimen.batches()[0]
    with torch.no_grad():
        assert not torch.allclose(run(narrow, batch), run(wide, batch), atol=1e-3)


def test_autocast_changes_between_blocks():
    model, seen = ZOO["autocast_inside"].build(), []
    for block in model.blocks:
        block.up.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    run(model, ZOO["autocast_inside"].batches()[0])
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


def test_the_fused_layer_calls_no_submodule():
    model, seen = ZOO["torch_transformer"].build(), []
    forward = model.encoder.layers[0].linear1.forward
    model.encoder.layers[0].linear1.forward = lambda x: seen.append(x) or forward(x)
    with torch.no_grad():
        run(model, ZOO["torch_transformer"].batches()[0])
    assert not seen
