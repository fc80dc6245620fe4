"""What support/zoo.py promises."""

import pytest
import torch
from support.zoo import TOKENS, WINDOW, ZOO, run


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_the_window_is_smaller_than_the_text(name):
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
