"""Multi-head attention whose products can be seen one by one.

`torch.nn.functional.multi_head_attention_forward` passes itself to a torch-function mode as a whole, and PyTorch turns
the mode off while it runs, without a switch. So `WeightInterceptor` calls this function in its place. It computes the
same to the bit: the same products in the same order, with tensors of the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Project query, key and value, attend, and project the result, as the function of PyTorch does.

    The arguments are those of that function. Unlike it, this does not check their shapes.
    """
    # One sample becomes a batch. Query, key and value are different tensors then, also where they were one, so each has
    # a product of its own, as in PyTorch.
    is_batched = query.ndim == 3
    if not is_batched:
        query = query.unsqueeze(1)
        key = key.unsqueeze(1)
        value = value.unsqueeze(1)
    steps, samples, width = query.shape
    heads = samples, num_heads

    if use_separate_proj_weight:
        weights = q_proj_weight, k_proj_weight, v_proj_weight
        q, k, v = _projected_apart((query, key, value), weights, in_proj_bias)
    else:
        q, k, v = _projected(query, key, value, in_proj_weight, in_proj_bias)
    q = _by_head(q, num_heads)
    k = _by_head(k, num_heads, bias_k, static_k, add_zero_attn)
    v = _by_head(v, num_heads, bias_v, static_v, add_zero_attn)

    # `is_causal` only says what kind of mask it is: the fused kernel then needs no mask, unless there is padding.
    is_causal = is_causal and key_padding_mask is None and not need_weights
    if is_causal:
        attn_mask = None
    mask = None
    extra_keys = k.shape[1] - len(key)
    if attn_mask is not None:
        mask = _added_to_scores(attn_mask, query.dtype, extra_keys)
        mask = mask.view(-1, steps, mask.shape[-1])
    if key_padding_mask is not None:
        padding = _added_to_scores(key_padding_mask, query.dtype, extra_keys)
        padding = padding.view(samples, 1, -1).repeat_interleave(num_heads, dim=0)
        mask = padding if mask is None else mask + padding
    if not training:
        dropout_p = 0.0

    attention = None
    if need_weights:
        mixed, attention = _attend(q, k, v, mask, dropout_p)
        attention = attention.unflatten(0, heads)
        if average_attn_weights:
            attention = attention.mean(dim=1)
        if not is_batched:
            attention = attention.squeeze(0)
    else:
        if mask is not None:
            # One mask may be for all samples and heads.
            mask = mask.unflatten(0, (1, 1) if len(mask) == 1 else heads)
        q, k, v = (tensor.unflatten(0, heads) for tensor in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        mixed = mixed.permute(2, 0, 1, 3)

    output = F.linear(mixed.reshape(steps * samples, width), out_proj_weight, out_proj_bias)
    output = output.unflatten(0, (steps, samples))
    if not is_batched:
        output = output.squeeze(1)
    return output, attention


def _projected_apart(
    inputs: Sequence[Tensor], weights: Sequence[Any], bias: Tensor | None
) -> Sequence[Tensor]:
    """Multiply query, key and value by a weight each."""
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(*factors) for factors in zip(inputs, weights, biases, strict=True)]


def _projected(
    query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None
) -> Sequence[Tensor]:
    """Multiply by one weight, which holds those of query, key and value; in one product where these are the same."""
    if key is not value:
        return _projected_apart((query, key, value), weight.chunk(3), bias)
    if query is key:
        return _side_by_side(F.linear(query, weight, bias), 3)

    sizes = [len(weight) // 3, 2 * len(weight) // 3]
    weight_q, weight_kv = weight.split(sizes)
    bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
    q = F.linear(query, weight_q, bias_q)
    return q, *_side_by_side(F.linear(key, weight_kv, bias_kv), 2)


def _side_by_side(projected: Tensor, number: int) -> Sequence[Tensor]:
    """Separate what one product computed."""
    # Each in one piece of memory, as in PyTorch: with other strides, a kernel may round in another way.
    return projected.unflatten(-1, (number, -1)).movedim(-2, 0).contiguous().unbind()


def _by_head(
    projected: Tensor,
    num_heads: int,
    bias: Tensor | None = None,
    static: Tensor | None = None,
    add_zero: bool = False,
) -> Tensor:
    """Return projected tokens as (samples x heads, tokens, features), with the keys or values that belong to no token.

    Those in `static` take the place of all tokens.
    """
    _, samples, width = projected.shape
    if bias is not None:
        projected = torch.cat([projected, bias.repeat(1, samples, 1)])
    shape = len(projected), samples * num_heads, width // num_heads
    heads = projected.view(shape).transpose(0, 1)
    if static is not None:
        heads = static
    if add_zero:
        heads = torch.cat([heads, heads.new_zeros(len(heads), 1, heads.shape[2])], dim=1)
    return heads


def _added_to_scores(mask: Tensor, dtype: torch.dtype, extra_keys: int) -> Tensor:
    """Return a mask as what is added to scores; the extra keys are never masked."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if extra_keys:
        mask = F.pad(mask, (0, extra_keys))
    return mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Return the mixed values of each head, with tokens first, and the attention that mixed them."""
    q = q * math.sqrt(1.0 / q.shape[-1])
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    attention = F.dropout(scores.softmax(dim=-1), dropout_p)
    return torch.bmm(attention, v).transpose(0, 1), attention
