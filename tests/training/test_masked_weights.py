"""The training loop of all recoveries: the gradients that its optimizer gets."""

from copy import deepcopy

import pytest
import torch
from support.quiet import prune
from support.recoveries import blocks, some_batches


@pytest.mark.parametrize("gain", [2.0**-12, 2.0**6])
def test_gradients_in_float16_neither_vanish_nor_overflow(gain):
    wide = blocks(torch.float32)
    for block in wide:
        for parameter in block.mlp[2].parameters():
            parameter.data *= gain
    half = deepcopy(wide).half()
    errors = []
    for model, dtype in (wide, torch.float32), (half, torch.float16):
        report = prune(model, some_batches(4, dtype), recovery="reconstruct", sequential="none")
        errors.append([layer.part.after for layer in report.layers])
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
