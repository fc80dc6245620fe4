"""What support/zoo.py promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.zoo import TOKENS, WINDOW, ZOO, Specimen, matching, matrices, run
from torch import nn

LAYERS = ("Linear", "Conv1D", "Conv2d", "NonDynamicallyQuantizableLinear")

every_specimen = pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO.keys())


def calls(model: nn.Module, batch: Any) -> Counter[str]:
    """Count the calls of each module for a batch, with gradients, so that transformer layers are not fused."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in model.named_modules()
    ]
    run(model, batch)
    for hook in hooks:
        hook.remove()
    return counts


@every_specimen
def test_builds_are_identical_and_leave_the_random_state_alone(specimen: Specimen):
    before = torch.get_rng_state()
    first, second = specimen.build().state_dict(), specimen.build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    once, again = ([t for batch in specimen.batches() for t in tensors(batch)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def tensors(batch: Any) -> list[torch.Tensor]:
    return list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]


@every_specimen
def test_outputs_are_finite_and_of_ordinary_size(specimen: Specimen):
    model = specimen.build()
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batches = specimen.batches()
    assert 2 <= len(batches) <= 3
    for batch in batches:
        with torch.no_grad():
            output = run(model, batch)
            again = run(model, batch)
        assert output.isfinite().all()
        assert 0.05 < output.std() < 10
        assert len(output) == len(tensors(batch)[0])
        assert torch.equal(output, again)


@every_specimen
def test_outputs_depend_on_every_matrix_that_is_reached(specimen: Specimen):
    model = specimen.build()
    for batch in specimen.batches():
        run(model, batch).square().sum().backward()
    found = matrices(model)
    used = {name for name, p in found.items() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert set(found) - used <= matching(found, specimen.uncalled)


@every_specimen
def test_every_glob_names_something(specimen: Specimen):
    model = specimen.build()
    for glob in (*specimen.dense, *specimen.uncalled, *specimen.read_past):
        assert matching(matrices(model), [glob]), glob
    for glob in specimen.blocks:
        assert len(matching(dict(model.named_modules()), [glob])) >= 2, glob


@every_specimen
def test_every_other_matrix_is_a_layer_that_fits_n_of_m(specimen: Specimen):
    model = specimen.build()
    for name in matrices(model).keys() - matching(matrices(model), specimen.dense):
        if (weight := matrices(model)[name]).ndim == 3:
            assert all(width % 8 == 0 for width in weight.shape[1:]), name
            continue
        layer = model.get_submodule(name)
        assert type(layer).__name__ in LAYERS, name
        d_in = (
            layer.in_channels if isinstance(layer, nn.Conv2d) else getattr(layer, "in_features", layer.weight.shape[0])
        )
        assert d_in % 8 == 0, name


@every_specimen
def test_blocks_and_layers_are_called_except_the_uncalled(specimen: Specimen):
    model = specimen.build()
    total = sum((calls(model, batch) for batch in specimen.batches()), Counter())
    layers = matrices(model).keys() - matching(matrices(model), specimen.dense)
    stacked = {name for name, weight in matrices(model).items() if weight.ndim == 3}
    module = {name: name.rsplit(".", 2)[0] if name in stacked else name for name in layers}
    assert {name for name in layers if not total[module[name]]} == matching(
        layers, [*specimen.uncalled, *specimen.read_past]
    )
    for name in matching(dict(model.named_modules()), specimen.blocks):
        assert total[name] or matching([f"{name}.up"], specimen.uncalled), name


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_two_kinds_of_attention_alternate(name: str):
    config = ZOO[name].build().config
    first, second, third = config.layer_types
    assert first == third != second


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


@pytest.mark.parametrize(("name", "real"), [("llama_padded", 0), ("llama_left_padded", -1), ("t5", 0)])
def test_padding_is_on_its_side(name: str, real: int):
    for batch in ZOO[name].batches():
        assert batch["attention_mask"][:, real].all()
        assert not batch["attention_mask"][:, -1 - real].all()
        assert (batch["input_ids"] == 0).equal(batch["attention_mask"] == 0)


def test_a_block_is_called_twice():
    specimen = ZOO["block_twice"]
    assert calls(specimen.build(), specimen.batches()[0])["blocks.1"] == 2


def test_a_batch_takes_one_route():
    specimen = ZOO["routed"]
    routes = [calls(specimen.build(), batch) for batch in specimen.batches()]
    assert [(route["blocks.1"], route["blocks.2"]) for route in routes] == [(1, 0), (0, 1), (1, 0)]


def test_two_layers_share_a_parameter():
    model = ZOO["tied"].build()
    assert model.first.weight is model.second.weight


def test_a_block_writes_into_its_input():
    model, x = ZOO["inplace"].build(), ZOO["inplace"].batches()[0]
    with torch.no_grad():
        before = x.clone()
        run(model, x)
        assert torch.equal(x, before)
        model.blocks[0](x)
    assert not torch.equal(x, before)


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
