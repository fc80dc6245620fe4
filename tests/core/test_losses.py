"""The divergence of rows, against `kl_div` of PyTorch and its autograd."""

from functools import partial

import pytest
import torch
from support import reference
from torch.testing import assert_close

from wanda_lightning.core import losses

by_pytorch = partial(reference.divergence, reduction="sum")


def gradient(loss, at):
    (slopes,) = torch.autograd.grad(3 * loss, at)
    return slopes


KEEP = {
    "no padding": None,
    "some": torch.arange(10) % 3 > 0,
    "only padding": torch.zeros(10, dtype=torch.bool),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("padding", KEEP)
def test_loss_and_gradient_are_those_of_pytorch(monkeypatch, padding, temperature):
    monkeypatch.setattr(losses, "_AT_ONCE", 3 * 7)  # three rows at a time
    predicted = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(10, 7).double()
    keep = KEEP[padding]
    loss = losses.summed_divergence(predicted, dense, keep, temperature)
    rows = slice(None) if keep is None else keep
    expected = by_pytorch(predicted[rows], dense[rows], temperature)
    assert_close(loss, expected)
    assert (loss > 0) == (padding != "only padding")
    assert_close(gradient(loss, predicted), gradient(expected, predicted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_16_bits_are_compared_in_float32(dtype):
    predicted = torch.randn(4, 500, dtype=dtype, requires_grad=True)
    dense = torch.randn(4, 500, dtype=dtype)
    wide = predicted.detach().float().requires_grad_()
    loss = losses.summed_divergence(predicted, dense)
    expected = by_pytorch(wide, dense.float())
    assert_close(loss, expected)
    slopes = gradient(loss, predicted).float()
    assert_close(slopes, gradient(expected, wide), rtol=1e-2, atol=1e-6)


def test_a_second_backward_pass_is_refused():
    predicted = torch.randn(2, 3, requires_grad=True)
    loss = losses.summed_divergence(predicted, torch.randn(2, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_class_that_is_impossible_for_both_adds_no_loss():
    predicted = torch.tensor([[1.0, -torch.inf, 3.0]])
    dense = torch.tensor([[2.0, -torch.inf, 3.0]])
    loss, slopes = losses.squared_error(predicted, dense)
    assert_close(loss, torch.tensor(1 / 3))
    assert_close(slopes, torch.tensor([[-2 / 3, 0, 0]]))
    possible = [0, 2]
    expected, expected_slopes = losses.divergence(predicted[:, possible], dense[:, possible])
    loss, slopes = losses.divergence(predicted, dense)
    assert_close(loss, expected)
    assert_close(slopes[:, possible], expected_slopes)
    assert slopes[0, 1] == 0
