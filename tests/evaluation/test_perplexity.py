"""Window perplexity against a loop over single tokens in float64."""

import math
from statistics import fmean, stdev

import pytest
import torch
from support.layers import rng
from support.modules import MASKS, slow_losses, slow_perplexity, windows_of_text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanda_lightning.evaluation import WindowPerplexity


def measured(logits, ids, attention_mask):
    metric = WindowPerplexity()
    metric.update(logits, ids, attention_mask)
    return metric.compute()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)])
def test_equals_the_slow_loop_in_one_batch_or_several(mask, dtype, rel, monkeypatch):
    monkeypatch.setattr("wanda_lightning.evaluation.perplexity._CHUNK", 5 * 128)
    ids = windows_of_text()
    logits = (3 * torch.randn(*ids.shape, 128, generator=rng(2))).to(dtype)
    attention_mask = MASKS[mask](ids)
    expected = pytest.approx(slow_perplexity(logits, ids, attention_mask), rel=rel)
    assert measured(logits, ids, attention_mask).item() == expected

    in_parts = WindowPerplexity()
    for row in range(len(ids)):
        part = slice(row, row + 1)
        mask_of_part = None if attention_mask is None else attention_mask[part]
        in_parts.update(logits[part], ids[part], mask_of_part)
    assert in_parts.compute().item() == expected


def test_the_standard_error_is_that_of_the_mean_loss_times_the_perplexity():
    ids = windows_of_text()
    logits = 3 * torch.randn(*ids.shape, 128, generator=rng(2))
    metric = WindowPerplexity()
    metric.update(logits, ids)
    losses = [fmean(losses) for losses in slow_losses(logits, ids)]
    error = math.exp(fmean(losses)) * stdev(losses) / len(losses) ** 0.5
    assert metric.standard_error() == pytest.approx(error, rel=1e-5)

    metric.reset()
    metric.update(1e5 * logits, ids)
    assert metric.compute().isinf()
    assert not math.isfinite(metric.standard_error())
    metric.reset()
    metric.update(logits[:1], ids[:1])
    assert math.isnan(metric.standard_error())


def test_padding_may_hold_anything():
    ids = windows_of_text()
    attention_mask = MASKS["right padding"](ids)
    logits = torch.randn(*ids.shape, 128)
    garbage = logits.masked_fill(attention_mask[..., None] == 0, math.nan)
    assert torch.equal(
        measured(garbage, ids, attention_mask), measured(logits, ids, attention_mask)
    )


def test_padding_alone_has_no_perplexity():
    ids = windows_of_text()
    assert measured(torch.randn(*ids.shape, 128), ids, torch.zeros_like(ids)).isnan()


class LargestNewTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation allocates."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            if tensor.untyped_storage().data_ptr() not in inputs:
                self.numel = max(self.numel, tensor.numel())
        return result


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def test_no_second_tensor_of_the_size_of_the_logits():
    logits = torch.zeros(4, 150, 2**15, dtype=torch.bfloat16)
    ids = torch.zeros(logits.shape[:2], dtype=torch.long)
    with LargestNewTensor() as largest:
        measured(logits, ids, torch.ones_like(ids))
    assert 0 < largest.numel <= 2**22 < logits.numel() / 4
