"""The training loop of all recoveries: the gradients that its optimizer gets."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.training.masked_weights import LARGEST_SCALE, MaskedWeights


class Step:
    """One step with a loss that is the sum of the outputs times a gain, for two samples."""

    def __init__(self, dtype, gain):
        torch.manual_seed(0)
        model = nn.Linear(8, 16).half().to(dtype)
        samples = torch.randn(4, 8).half().to(dtype).split(2)
        self.scales = []

        def loss(samples, scale):
            self.scales.append(scale)
            for sample in samples:
                total = (model(sample).float() * gain).sum()
                total.backward(torch.full_like(total, scale))
                yield total.item()

        with MaskedWeights(model, [model.weight], [], SINGLE_PROCESS) as weights:
            optimizer = torch.optim.SGD(weights.groups(1.0))
            optimizer.register_step_pre_hook(self._keep_gradient)
            weights.step(optimizer, samples, loss)

    def _keep_gradient(self, optimizer, *_):
        self.gradient = optimizer.param_groups[0]["params"][0].grad.clone()


@pytest.mark.parametrize(("gain", "overflows"), [(2.0**-22, False), (2.0**12, True)])
def test_gradients_in_float16_neither_vanish_nor_overflow(gain, overflows):
    half = Step(torch.float16, gain)
    wide = Step(torch.float32, gain)
    assert half.gradient.dtype == torch.float32
    tolerance = 0.01 * wide.gradient.abs().max().item()
    assert_close(half.gradient, wide.gradient, rtol=0.01, atol=tolerance)
    assert (min(half.scales) < LARGEST_SCALE) == overflows
