"""Multi-head attention, bit for bit against the function of PyTorch."""

import inspect
from itertools import product

import pytest
import torch
from support.pairwise import pairwise
from torch.nn import functional as F

from wanda_lightning.calibration import attention
from wanda_lightning.calibration.attention import arguments_of, multi_head_attention
from wanda_lightning.calibration.interception import WeightInterceptor

WIDTH = 16
HEADS = 2
STEPS = 5
KEYS = 7

OPTIONS = {
    "bias": (True, False),
    "mask": (None, "bool", "float", "float of each head"),
    "padding": (None, "bool", "float"),
    "weights": ("mean", "each head", None),
    "is_causal": (True, False),
    "training": (True, False),
}


def is_allowed(bias, mask, padding, weights, is_causal, *others):
    """`is_causal` is a hint about a mask."""
    return mask is not None or not is_causal


def hidden(*shape):
    """A mask of keys, which never hides the first one: then a row would have no key, and NaN."""
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False
    return mask


def projections(inputs, have_own_weights):
    """The arguments for the weights of query, key and value: one for each, or one for all."""
    if not have_own_weights:
        return {"in_proj_weight": torch.randn(3 * WIDTH, WIDTH)}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    arguments = {"in_proj_weight": None, "use_separate_proj_weight": True}
    for name, tokens in zip(names, inputs, strict=True):
        arguments[name] = torch.randn(WIDTH, tokens.shape[-1])
    return arguments


def options_of(inputs, options):
    """The arguments for some options, without the weights of query, key and value."""
    query, key, value = inputs
    samples = query.shape[1] if query.ndim == 3 else 1
    keys = len(key)
    masks = {
        None: None,
        "bool": hidden(STEPS, keys),
        "float": torch.randn(STEPS, keys),
        "float of each head": torch.randn(samples * HEADS, STEPS, keys),
    }
    padding_shape = (*query.shape[1:-1], keys)
    paddings = {None: None, "bool": hidden(*padding_shape), "float": torch.randn(padding_shape)}
    return {
        "query": query,
        "key": key,
        "value": value,
        "embed_dim_to_check": WIDTH,
        "num_heads": HEADS,
        "in_proj_bias": torch.randn(3 * WIDTH) if options["bias"] else None,
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.5,
        "out_proj_weight": torch.randn(WIDTH, WIDTH),
        "out_proj_bias": torch.randn(WIDTH) if options["bias"] else None,
        "training": options["training"],
        "key_padding_mask": paddings[options["padding"]],
        "need_weights": options["weights"] is not None,
        "attn_mask": masks[options["mask"]],
        "average_attn_weights": options["weights"] == "mean",
        "is_causal": options["is_causal"],
    }


@pytest.mark.parametrize("combine", [pairwise, pytest.param(product, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("batch", [(3,), (1,), ()], ids=["batch", "batch of one", "no batch"])
@pytest.mark.parametrize("kind", ["self", "cross", "all different", "weights of their own"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_results_have_the_bits_of_pytorch(kind, batch, combine):
    torch.manual_seed(0)
    query = torch.randn(STEPS, *batch, WIDTH)
    key = query if kind == "self" else torch.randn(KEYS, *batch, WIDTH)
    value = key if kind in ("self", "cross") else torch.randn(KEYS, *batch, WIDTH)
    if kind == "weights of their own":
        key = torch.randn(KEYS, *batch, 6)
        value = torch.randn(KEYS, *batch, 9)
    inputs = query, key, value
    for combination in combine(*OPTIONS.values()):
        if not is_allowed(*combination):
            continue
        options = dict(zip(OPTIONS, combination, strict=True))
        arguments = options_of(inputs, options) | projections(
            inputs, have_own_weights=kind == "weights of their own"
        )
        torch.manual_seed(1)  # dropout
        results = [F.multi_head_attention_forward(**arguments)]
        torch.manual_seed(1)
        results.append(multi_head_attention(**arguments_of((), arguments)))
        torch.testing.assert_close(*results, rtol=0, atol=0, msg=f"differs with {options}")


def test_keys_of_no_token_are_left_to_pytorch():
    module = torch.nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(3, 2, 8)
    expected, _ = module(x, x, x)
    with WeightInterceptor([], lambda products, multiply: multiply()):
        actual, _ = module(x, x, x)
    assert torch.equal(actual, expected)


def test_pytorch_has_the_same_parameters():
    theirs = inspect.signature(F.multi_head_attention_forward).parameters.keys()
    ours = inspect.signature(multi_head_attention).parameters.keys()
    assert theirs == {*ours, *attention._FURTHER_KEYS, "embed_dim_to_check"}, (
        "torch.nn.functional.multi_head_attention_forward has other parameters than "
        "calibration/attention.py, which computes the same: add them there"
    )
