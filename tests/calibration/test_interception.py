"""Weights that are multiplied outside the forward of their layer: against the same models with every layer called."""

import math
import weakref
from copy import deepcopy
from itertools import product

import numpy as np
import pytest
import torch
from support.callbacks import zeros
from support.layers import assert_same, rng
from support.pairwise import pairwise, with_nightly
from support.quiet import prune
from support.zoo import model_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from wanda_lightning import OWL, Fisher, Reconstruct, SparseGPT
from wanda_lightning.calibration.interception import WeightInterceptor, WeightMemory
from wanda_lightning.core.patterns import NM
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers

WIDTH = 16
HEADS = 2


class Block(nn.Module):
    """Attention and an MLP, whose layers multiply by some formula."""

    def __init__(self, formula):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up = Conv1D(24, WIDTH)
        self.down = nn.Linear(24, WIDTH)
        self.formula = formula

    def forward(self, x):
        return x + self.formula(self, x)


def mlp(self, q, k, v):
    return self.down(self.up(F.scaled_dot_product_attention(q, k, v)).relu())


def fused(self, x):
    return mlp(self, *self.qkv(x).chunk(3, dim=-1))


def fused_past(self, x):
    q, k, v = F.linear(x, weight=self.qkv.weight, bias=self.qkv.bias).chunk(3, dim=-1)
    x = F.scaled_dot_product_attention(q, k, v)
    x = torch.addmm(self.up.bias, x.reshape(-1, WIDTH), self.up.weight).unflatten(0, x.shape[:-1])
    return x.relu() @ self.down.weight.T + self.down.bias


def in_pieces(self, x):
    weights = self.qkv.weight.chunk(3)
    biases = self.qkv.bias.chunk(3)
    q, k, v = map(F.linear, (x, x, x), weights, biases)
    return mlp(self, q, k, v)


def from_the_left(self, x):
    """As Mamba does it."""
    qkv = (self.qkv.weight @ x.mT + self.qkv.bias[:, None]).mT
    return mlp(self, *qkv.chunk(3, dim=-1))


def separate(self, x):
    q, k, v = (
        layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
    )
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def separate_past(self, x):
    """As WavLM does it."""
    q = x.transpose(0, 1)

    out, _ = F.multi_head_attention_forward(
        query=q,
        key=q,
        value=q,
        embed_dim_to_check=WIDTH,
        num_heads=HEADS,
        in_proj_weight=None,
        in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=self.out.weight,
        out_proj_bias=self.out.bias,
        training=False,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=self.q.weight,
        k_proj_weight=self.k.weight,
        v_proj_weight=self.v.weight,
    )
    return out.transpose(0, 1)


PAIRS = {
    "fused": (fused, fused_past),
    "in_pieces": (fused, in_pieces),
    "from_the_left": (fused, from_the_left),
    "separate": (separate, separate_past),
}


def build(formula):
    torch.manual_seed(0)
    return nn.Sequential(Block(formula), Block(formula), nn.Linear(WIDTH, 8)).double().eval()


def vectors():
    generator = rng(1)
    return [torch.randn(n, 5, WIDTH, generator=generator).double() for n in (2, 1, 3)]


CHOICES = {
    "wanda": {},
    "sparsegpt": {"solver": SparseGPT()},
    "fisher": {"allocation": Fisher()},
    "owl": {"allocation": OWL(), "pattern": NM(2, 4)},
    "reconstruct": {"recovery": Reconstruct(epochs=3), "sequential": "block"},
}


@pytest.mark.parametrize(
    ("pair", "choices", "sequential"),
    with_nightly(
        pairwise(PAIRS, CHOICES, SEQUENTIAL_CHOICES), product(PAIRS, CHOICES, SEQUENTIAL_CHOICES)
    ),
)
def test_pruned_as_if_called(pair, choices, sequential):
    called, past = (build(formula) for formula in PAIRS[pair])
    options = {"sequential": sequential} | CHOICES[choices]
    report, expected = (prune(model, vectors(), 0.5, **options) for model in (past, called))
    assert [matrix.name for matrix in report.skipped] == [
        matrix.name for matrix in expected.skipped
    ]
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert (one.name, one.tokens, one.note) == (other.name, other.tokens, other.note)
        assert math.isclose(one.target, other.target, abs_tol=1e-9)
    assert_same(zeros(called), zeros(past))
    assert_close(called.state_dict(), past.state_dict(), rtol=0, atol=1e-9)


def test_a_layer_alone_outside_of_blocks():
    """A pooling head of which nothing is called: batches stop at its products."""

    class Pooled(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x[:1], x, x)[0]

    model = nn.Sequential(*build(fused), Pooled(8, HEADS)).double().eval()
    report = prune(model, vectors(), 0.5)
    assert {layer.name: layer.tokens for layer in report.layers}["3.out_proj"] == 15


LAYER = nn.Linear(WIDTH, WIDTH)
X = torch.randn(2, 3, WIDTH)
W = LAYER.weight
BIAS = torch.zeros(WIDTH)
ROWS = X.flatten(0, 1)


def intercepted(multiply):
    """The tokens of the products that are seen while something is multiplied, and the result."""
    found = []

    def on_product(products, multiply):
        found.append(products[0].tokens)
        return multiply()

    with (
        torch.no_grad(),
        WeightInterceptor(find_layers(nn.Sequential(LAYER), "none").layers, on_product),
    ):
        return found, multiply()


OTHERS = [
    lambda: ROWS @ W,  # the transposed one
    lambda: F.linear(ROWS[:, :4], W[:, :4]),
    lambda: F.linear(ROWS, W.clone()),
    lambda: F.linear(ROWS, W + W),
    lambda: W @ W.mT,  # no tokens
    lambda: torch.eye(WIDTH).to_sparse() @ W.mT,
    lambda: torch.vmap(lambda x: F.linear(x, W))(X),
]
PRODUCTS = [
    lambda: F.linear(X, W, BIAS),
    lambda: F.linear(bias=BIAS, weight=W, input=X),
    lambda: X @ W.mT,
    lambda: torch.bmm(X, W.mT.expand(2, -1, -1)),
    lambda: torch.baddbmm(BIAS, X, W.mT.expand(2, -1, -1)),
    lambda: torch.addmm(BIAS, ROWS, W.mT),
    lambda: W.mm(ROWS.t()).t(),
]


@pytest.mark.parametrize("multiply", [*OTHERS, *PRODUCTS])
def test_products_with_all_inputs_are_intercepted_in_every_way_to_pass_them(multiply):
    found, result = intercepted(multiply)
    if multiply in OTHERS:
        assert found == []
    else:
        assert torch.equal(torch.cat(found).reshape(X.shape), X)
        assert_close(result.reshape(X.shape), F.linear(X, W))


TRANSFORMER = model_of("torch_transformer")


class Text(type(TRANSFORMER)):
    """Attention wants time first, where a mask of (samples, tokens) says nothing of rows one behind the other."""

    def forward(self, x, attention_mask):
        return self.head(self.encoder(x, src_key_padding_mask=~attention_mask))


@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("lengths", [(5, 2), (5, 5, 5, 5, 1)])
def test_padding_inside_of_attention_is_left_out(sequential, lengths):
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    x = torch.randn(*mask.shape, 32)
    weights = []
    for noise in (0.0, 100.0):  # of padding
        model = deepcopy(TRANSFORMER)
        model.__class__ = Text
        batch = {"x": x + noise * torch.randn_like(x) * ~mask[..., None], "attention_mask": mask}
        report = prune(model, [batch], 0.5, sequential=sequential)
        assert {(layer.tokens, "padding" in layer.note) for layer in report.layers} == {
            (sum(lengths), False)
        }
        weights.append(model.state_dict())
    assert_same(*weights)


def test_a_weight_that_is_freed_does_not_stay_in_memory():
    model = nn.Sequential(nn.Linear(8, 6))
    array = np.ones((6, 8), dtype=np.float32)
    model[0].weight = nn.Parameter(torch.from_numpy(array))
    memory = WeightMemory(find_layers(model).layers)
    freed = weakref.ref(array)
    assert [match.layer.name for match in memory.matches(model[0].weight.detach().mT)] == ["0"]
    del array
    assert freed() is not None
    model[0].weight = nn.Parameter(torch.zeros(6, 8))
    assert freed() is None
