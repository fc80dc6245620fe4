"""Multi-head attention, bit for bit against the function of PyTorch."""

import inspect
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from wanda_lightning.calibration.attention import multi_head_attention

WIDTH = 16
HEADS = 2
SAMPLES = 3
STEPS = 5
KEYS = 7


def numbers(*shape):
    return torch.randn(shape)


def hidden(*shape):
    """A mask of keys, which never hides the first one."""
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False
    return mask


def both(*args, **kwargs):
    """What PyTorch computes and what we compute, with the gradients of a random projection of the output."""
    results = []
    for function in (F.multi_head_attention_forward, multi_head_attention):
        torch.manual_seed(0)
        results.append(function(*args, **kwargs))
    return results


def same(one, other):
    return (one is None and other is None) or torch.equal(one, other)


# Whether query, key and value are one tensor, or only key and value, or none of them.
INPUTS = ("self", "cross", "all different", "separate weights", "no sharing of weights")
MASKS = (None, "bool", "float", "each head")
PADDINGS = (None, "bool", "float")


def inputs_of(kind, batch):
    keys = STEPS if kind == "self" else KEYS
    query = numbers(STEPS, *batch, WIDTH)
    if kind == "self":
        return query, query, query
    key = numbers(keys, *batch, WIDTH)
    return query, key, key if kind == "cross" else numbers(keys, *batch, WIDTH)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(SAMPLES,), (1,), ()], ids=["batch", "batch of one", "no batch"])
@pytest.mark.parametrize("kind", ["self", "cross", "all different", "separate weights"])
def test_every_combination_of_arguments_has_the_same_bits(kind, batch, bias):
    query, key, value = inputs_of(kind, batch)
    samples = batch[0] if batch else 1
    projection = dict.fromkeys(["q_proj_weight", "k_proj_weight", "v_proj_weight"])
    if kind == "separate weights":
        key, value = numbers(KEYS, *batch, 6), numbers(KEYS, *batch, 9)
        widths = (WIDTH, 6, 9)
        projection = dict(zip(projection, [numbers(WIDTH, width) for width in widths], strict=True))
    in_proj_weight = None if kind == "separate weights" else numbers(3 * WIDTH, WIDTH)
    masks = {
        None: None,
        "bool": hidden(STEPS, len(key)),
        "float": numbers(STEPS, len(key)),
        "each head": numbers(samples * HEADS, STEPS, len(key)),
    }
    paddings = {
        None: None,
        "bool": hidden(*batch, len(key)),
        "float": numbers(*batch, len(key)),
    }
    extra = numbers(1, 1, WIDTH), numbers(1, 1, WIDTH)
    static = numbers(samples * HEADS, len(key), WIDTH // HEADS)
    out = numbers(WIDTH, WIDTH)
    choices = product(
        masks,
        paddings,
        ("need", "all heads", "no weights"),
        (False, True),  # causal
        ("", "bias", "static_k", "static_v"),
        (False, True),  # zeros
        (False, True),  # training
    )
    for mask, padding, weights, is_causal, more, zero, training in choices:
        if is_causal and mask is None:
            continue
        arguments = (
            query,
            key,
            value,
            WIDTH,
            HEADS,
            in_proj_weight,
            numbers(3 * WIDTH) if bias else None,
            extra[0] if more == "bias" else None,
            extra[1] if more == "bias" else None,
            zero,
            0.5,
            out,
            numbers(WIDTH) if bias else None,
        )
        ours, theirs = both(
            *arguments,
            training=training,
            key_padding_mask=paddings[padding],
            need_weights=weights != "no weights",
            attn_mask=masks[mask],
            use_separate_proj_weight=kind == "separate weights",
            static_k=static if more == "static_k" else None,
            static_v=static if more == "static_v" else None,
            average_attn_weights=weights == "need",
            is_causal=is_causal,
            **projection,
        )
        assert all(map(same, ours, theirs)), (mask, padding, weights, is_causal, more, zero)


def test_pytorch_has_the_same_parameters():
    theirs = inspect.signature(F.multi_head_attention_forward).parameters
    ours = inspect.signature(multi_head_attention).parameters
    assert [*theirs] == [*ours]
