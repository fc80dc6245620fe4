"""Window perplexity against a loop over single tokens in float64."""

import math

import pytest
import torch
from support.modules import MASKS, slow_perplexity, windows_of_text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanda_lightning.modules import WindowPerplexity


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)])
def test_equals_the_slow_loop_in_one_batch_or_several(mask, dtype, rel, monkeypatch):
    monkeypatch.setattr("wanda_lightning.modules.perplexity._CHUNK", 5 * 128)
    ids = windows_of_text()
    logits = (torch.randn(*ids.shape, 128, generator=torch.Generator().manual_seed(2)) * 3).to(
        dtype
    )
    attention_mask = MASKS[mask](ids)
    whole = WindowPerplexity()
    parts = WindowPerplexity()
    whole.update(logits, ids, attention_mask)
    for part in torch.arange(len(ids)).split(1):
        parts.update(
            logits[part], ids[part], None if attention_mask is None else attention_mask[part]
        )
    for metric in (whole, parts):
        assert metric.compute().item() == pytest.approx(
            slow_perplexity(logits, ids, attention_mask), rel=rel
        )


def test_padding_may_hold_anything():
    ids = windows_of_text()
    attention_mask = MASKS["right padding"](ids)
    logits = torch.randn(*ids.shape, 128)
    garbage = logits.masked_fill(attention_mask[..., None] == 0, math.nan)
    metric = WindowPerplexity()
    clean = WindowPerplexity()
    metric.update(garbage, ids, attention_mask)
    clean.update(logits, ids, attention_mask)
    assert torch.equal(metric.compute(), clean.compute())
    (only := WindowPerplexity()).update(logits, ids, torch.zeros_like(ids))
    assert only.compute().isnan()


def test_no_second_tensor_of_the_size_of_the_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {
                t.untyped_storage().data_ptr()
                for t in tree_leaves((args, kwargs))
                if torch.is_tensor(t)
            }
            new = [t for t in tree_leaves(out) if torch.is_tensor(t)]
            new = [t.numel() for t in new if t.untyped_storage().data_ptr() not in known]
            self.numel = max([self.numel, *new])
            return out

    logits = torch.zeros(4, 150, 2**15, dtype=torch.bfloat16)
    ids = torch.zeros(logits.shape[:2], dtype=torch.long)
    with Largest() as largest:
        WindowPerplexity().update(logits, ids, torch.ones_like(ids))
    assert 0 < largest.numel <= 2**22 < logits.numel() / 4
