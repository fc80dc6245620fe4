"""The training loop of all recoveries: the gradients that its optimizer gets."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.training.masked_weights import LARGEST_SCALE, MaskedWeights


def step(dtype, gain):
    """One step with a loss that is the sum of the outputs times a gain, for two samples: its gradient and scales."""
    torch.manual_seed(0)
    model = nn.Linear(8, 16).half().to(dtype)
    samples = torch.randn(4, 8).half().to(dtype).split(2)
    scales = []
    gradients = []

    def loss(samples, scale):
        scales.append(scale)
        for sample in samples:
            total = (model(sample).float() * gain).sum()
            total.backward(torch.full_like(total, scale))
            yield total.item()

    def keep_gradient(optimizer, *_):
        gradients.append(optimizer.param_groups[0]["params"][0].grad.clone())

    with MaskedWeights(model, [model.weight], [], SINGLE_PROCESS) as weights:
        optimizer = torch.optim.SGD(weights.groups(1.0))
        optimizer.register_step_pre_hook(keep_gradient)
        weights.step(optimizer, samples, loss)
    return gradients[0], scales


@pytest.mark.parametrize(("gain", "overflows"), [(2.0**-22, False), (2.0**12, True)])
def test_gradients_in_float16_neither_vanish_nor_overflow(gain, overflows):
    half, scales = step(torch.float16, gain)
    wide, _ = step(torch.float32, gain)
    assert half.dtype == torch.float32
    assert_close(half, wide, rtol=0.01, atol=0.01 * wide.abs().max().item())
    assert (min(scales) < LARGEST_SCALE) == overflows
