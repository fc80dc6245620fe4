"""Multi-head attention whose products can be seen one by one.

`torch.nn.functional.multi_head_attention_forward` passes itself to a torch-function mode as a whole, and PyTorch turns
the mode off while it runs, without a switch. So `WeightInterceptor` calls this function in its place. It computes the
same to the bit: the same products in the same order, with tensors of the same layout.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wanda_lightning.common.aliases import Kwargs

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_FURTHER_KEYS = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")


def arguments_of(args: Any, kwargs: Any) -> Kwargs | None:
    """Return the arguments of a call of PyTorch's function for `multi_head_attention`.

    None if keys or values belong to no token: then PyTorch's own function computes it, and its products are not seen.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    further = [arguments.pop(name) for name in _FURTHER_KEYS]
    if any(value is not None and value is not False for value in further):
        return None
    del arguments["embed_dim_to_check"]
    return arguments


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Any,
    training: bool,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    use_separate_proj_weight: bool,
    q_proj_weight: Any,
    k_proj_weight: Any,
    v_proj_weight: Any,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Project query, key and value, attend, and project the result. Shapes are not checked."""
    # One sample becomes a batch. Query, key and value are different tensors then, also where they were one, so each has
    # a product of its own, as in PyTorch.
    is_batched = query.ndim == 3
    if not is_batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    steps, samples, width = query.shape

    if use_separate_proj_weight:
        weights = q_proj_weight, k_proj_weight, v_proj_weight
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = F._in_projection(query, key, value, *weights, *biases)  # type: ignore[attr-defined]
    else:
        projected = F._in_projection_packed(query, key, value, in_proj_weight, in_proj_bias)  # type: ignore[attr-defined]
    # (samples, heads, tokens, features)
    q, k, v = (
        tensor.view(len(tensor), samples * num_heads, -1)
        .transpose(0, 1)
        .unflatten(0, (samples, num_heads))
        for tensor in projected
    )

    # `is_causal` only says what kind of mask it is: the fused kernel then needs no mask, unless there is padding.
    is_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None
    if attn_mask is not None and not is_causal:
        mask = _added_to_scores(attn_mask, query.dtype)
        # One mask may be for all samples and heads.
        mask = mask.view(1, 1, *mask.shape) if mask.ndim == 2 else mask.unflatten(0, (samples, -1))
    if key_padding_mask is not None:
        padding = _added_to_scores(key_padding_mask, query.dtype).view(samples, 1, 1, -1)
        padding = padding.expand(-1, num_heads, -1, -1)
        mask = padding if mask is None else mask + padding

    attention = None
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        mixed, attention = _attend(q, k, v, mask, dropout_p)
        if average_attn_weights:
            attention = attention.mean(dim=1)
        if not is_batched:
            attention = attention.squeeze(0)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)

    mixed = mixed.permute(2, 0, 1, 3).reshape(steps * samples, width)
    output = F.linear(mixed, out_proj_weight, out_proj_bias).unflatten(0, (steps, samples))
    return output if is_batched else output.squeeze(1), attention


def _added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Return the mixed values of each head, and the attention that mixed them."""
    heads = q.shape[:2]
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    q = q * math.sqrt(1.0 / q.shape[-1])
    if mask is None:
        scores = torch.bmm(q, k.mT)
    else:
        mask = mask.expand(*heads, *mask.shape[2:]).flatten(0, 1)
        scores = torch.baddbmm(mask, q, k.mT)
    attention = F.dropout(scores.softmax(dim=-1), dropout_p)
    mixed = torch.bmm(attention, v)
    return mixed.unflatten(0, heads), attention.unflatten(0, heads)
