"""Weights that are multiplied outside the forward of their layer: against the same models with every layer called."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
from support.pairwise import pairwise, with_nightly
from support.samples import as_samples
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from wanda_lightning import OWL, Fisher, Reconstruct, SparseGPT, prune
from wanda_lightning.calibration.interception import WeightInterceptor, intercept
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.unit_stops import whole_model_calls
from wanda_lightning.core.patterns import NM
from wanda_lightning.core.statistics import SUMS
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers

WIDTH, HEADS = 16, 2


class Block(nn.Module):
    """Attention and an MLP; by which formula its layers multiply is up to the test."""

    def __init__(self, formula):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = Conv1D(24, WIDTH), nn.Linear(24, WIDTH)
        self.formula = formula

    def forward(self, x):
        return x + self.formula(self, x)


def fused(self, x):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    return self.down(self.up(F.scaled_dot_product_attention(q, k, v)).relu())


def fused_past(self, x):
    q, k, v = F.linear(x, weight=self.qkv.weight, bias=self.qkv.bias).chunk(3, dim=-1)
    x = F.scaled_dot_product_attention(q, k, v)
    x = torch.addmm(self.up.bias, x.reshape(-1, WIDTH), self.up.weight).unflatten(0, x.shape[:-1])
    return x.relu() @ self.down.weight.T + self.down.bias


def in_pieces(self, x):
    weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
    q, k, v = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return self.down(self.up(F.scaled_dot_product_attention(q, k, v)).relu())


def from_the_left(self, x):
    """As Mamba does it."""
    q, k, v = (self.qkv.weight @ x.mT + self.qkv.bias[:, None]).mT.chunk(3, dim=-1)
    return self.down(self.up(F.scaled_dot_product_attention(q, k, v)).relu())


def separate(self, x):
    q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def separate_past(self, x):
    """As WavLM does it."""
    q = x.transpose(0, 1)
    biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
    weights = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
    attention = partial(F.multi_head_attention_forward, use_separate_proj_weight=True, need_weights=False, **weights)
    out, _ = attention(
        q, q, q, WIDTH, HEADS, None, biases, None, None, False, 0.0, self.out.weight, self.out.bias, training=False
    )
    return out.transpose(0, 1)


PAIRS = {
    "fused": (fused, fused_past),
    "in_pieces": (fused, in_pieces),
    "from_the_left": (fused, from_the_left),
    "separate": (separate, separate_past),
    "unchanged": (fused, fused),
}


def build(formula):
    torch.manual_seed(0)
    model = nn.Sequential(Block(formula), Block(formula), nn.Linear(WIDTH, 8)).double()
    return model.eval()


def vectors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, WIDTH, generator=generator).double() for n in (2, 1, 3)]


CHOICES = {
    "wanda": {},
    "sparsegpt": {"solver": SparseGPT()},
    "fisher": {"allocation": Fisher()},
    "owl": {"allocation": OWL(), "pattern": NM(2, 4)},
}


@pytest.mark.parametrize(
    ("pair", "choices", "sequential"),
    with_nightly(pairwise(PAIRS, CHOICES, SEQUENTIAL_CHOICES), product(PAIRS, CHOICES, SEQUENTIAL_CHOICES)),
)
def test_pruned_as_if_called(pair, choices, sequential):
    (called, past), choices = (build(formula) for formula in PAIRS[pair]), CHOICES[choices]
    reports = [prune(m, vectors(), 0.5, sequential=sequential, progress=False, **choices) for m in (called, past)]
    assert [matrix.name for matrix in reports[0].skipped] == [matrix.name for matrix in reports[1].skipped]
    for one, other in zip(*(report.layers for report in reports), strict=True):
        assert (one.name, one.tokens, one.note) == (other.name, other.tokens, other.note)
        assert math.isclose(one.target, other.target, abs_tol=1e-9)
    for (name, one), other in zip(called.named_parameters(), past.parameters(), strict=True):
        assert torch.equal(one != 0, other != 0), name
        assert torch.allclose(one, other, atol=1e-9), name


def test_a_layer_alone_outside_of_blocks():
    """A pooling head of which nothing is called: batches stop at its products."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(fused), Block(fused)])
            self.probe, self.attention = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.MultiheadAttention(WIDTH, HEADS)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            x = x.transpose(0, 1)
            return self.attention(self.probe.expand(-1, x.shape[1], -1), x, x)[0]

    torch.manual_seed(0)
    model = Pooled().double().eval()
    report = prune(model, vectors(), 0.5, progress=False)
    assert "attention.out_proj" in [layer.name for layer in report.layers]
    assert next(layer for layer in report.layers if layer.name == "attention.out_proj").tokens == 6


def observed(model, batches, **options):
    observer = Observer(frozenset(SUMS), **options)
    (unit,) = find_layers(model, "none").units
    with torch.no_grad():
        return observer(unit, whole_model_calls(as_samples([partial(model, x) for x in batches])))


def test_a_layer_that_is_called_and_read_past_counts_both():
    def twice(self, x):
        return fused(self, x) + F.linear(2 * x, self.q.weight) + self.q(x)

    batches = vectors()
    statistics = observed(build(fused), batches)
    both = observed(build(twice), batches)
    assert both["0.qkv"].count == statistics["0.qkv"].count == 30
    assert both["0.q"].count == 60
    assert torch.allclose(both["0.q"].sums["square_sum"], 5 * both["0.qkv"].sums["square_sum"])


def test_layers_with_one_input_share_its_statistics():
    statistics = observed(build(separate_past), vectors())
    assert statistics["0.q"].sums is statistics["0.k"].sums is statistics["0.v"].sums


def test_only_products_with_all_inputs_are_intercepted():
    layer = nn.Linear(WIDTH, WIDTH)
    (unit,) = find_layers(nn.Sequential(layer)).units
    names = []

    def on_product(products, multiply):
        names.extend(product.layer.name for product in products)
        return multiply()

    x = torch.randn(3, WIDTH)
    with torch.no_grad(), WeightInterceptor(unit.layers, on_product):
        x @ layer.weight  # the transposed one
        F.linear(x[:, :4], layer.weight[:, :4])
        F.linear(x, layer.weight.clone())
        F.linear(x, layer.weight + layer.weight)
        layer.weight @ layer.weight.mT  # no tokens
        assert not names
        F.linear(x, layer.weight[2:])
        assert names == ["0"]


def test_every_way_to_pass_the_factors(monkeypatch):
    layer = nn.Linear(WIDTH, WIDTH)
    intercepted = []

    def on_product(products, multiply):
        intercepted.append(products[0].tokens)
        return multiply()

    x, bias = torch.randn(2, 3, WIDTH), torch.zeros(WIDTH)
    weight = layer.weight
    ways = [
        lambda: F.linear(x, weight, bias),
        lambda: F.linear(bias=bias, weight=weight, input=x),
        lambda: x @ weight.mT,
        lambda: torch.matmul(input=x, other=weight.mT),
        lambda: torch.bmm(x, weight.mT.expand(2, -1, -1)),
        lambda: torch.bmm(mat2=weight.mT.expand(2, -1, -1), input=x),
        lambda: torch.baddbmm(bias, x, weight.mT.expand(2, -1, -1)),
        lambda: torch.addmm(bias, x.flatten(0, 1), weight.mT).unflatten(0, (2, 3)),
        lambda: torch.addmm(mat2=weight.mT, mat1=x.flatten(0, 1), input=bias).unflatten(0, (2, 3)),
        lambda: weight.mm(x.flatten(0, 1).t()).t().unflatten(0, (2, 3)),
    ]
    expected = F.linear(x, weight)
    for index, way in enumerate(ways):
        with (
            torch.no_grad(),
            WeightInterceptor(find_layers(nn.Sequential(layer), "none", only=["0"]).layers, on_product),
        ):
            torch.testing.assert_close(way(), expected)
        assert len(intercepted) == index + 1
        assert torch.equal(intercepted[-1].reshape(x.shape), x)


class Graph(nn.Module):
    """What it multiplies besides weights has no memory of its own: a sparse matrix, vectors under `vmap`."""

    def __init__(self):
        super().__init__()
        self.a, self.nothing, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 0), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("neighbours", torch.eye(3).roll(1, 0).to_sparse())

    def forward(self, x):
        x = self.neighbours @ self.a(x)
        return self.b(torch.vmap(lambda each: each @ each.mT @ each)(x[None])[0] / 10)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_tensors_without_memory_of_their_own_are_multiplied_as_usual(sequential):
    torch.manual_seed(0)
    blocks = nn.Sequential(Graph(), Graph())
    report = prune(blocks, [torch.randn(3, WIDTH)], 0.5, progress=False, sequential=sequential)
    assert [(layer.tokens, layer.sparsity) for layer in report.layers if layer.name[2:] != "nothing"] == [(3, 0.5)] * 4


def test_nothing_is_left_behind_after_an_error():
    model = build(fused)
    before = [dict(module.__dict__) for module in model.modules()]

    def on_product(products, multiply):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), intercept(find_layers(model, "none").layers, on_product):
        model(vectors()[0])
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("mask", ["11111 11000", "11111 11111 11111 11111 10000"])
def test_padding_inside_of_attention_is_left_out(sequential, mask):
    """Attention wants time first, where a mask of (samples, tokens) says nothing of rows one behind the other."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True) for _ in range(2)
            )

        def forward(self, x, attention_mask):
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=attention_mask == 0)
            return x

    torch.manual_seed(0)
    mask = torch.tensor([list(map(int, row)) for row in mask.split()])
    x = torch.randn(*mask.shape, WIDTH)
    model = Text().eval()
    reports = []
    for noise in (0.0, 100.0):  # of padding
        batch = {"x": x + noise * torch.randn_like(x) * (mask == 0)[..., None], "attention_mask": mask}
        reports.append(prune(pruned := copy.deepcopy(model), [batch], 0.5, progress=False, sequential=sequential))
        for layer in reports[-1].layers:
            assert (layer.tokens, layer.note) == (int(mask.sum()), ""), layer.name
        reports.append(pruned.state_dict())
    torch.testing.assert_close(reports[1], reports[3], rtol=0, atol=0)


def test_reconstruction_trains_what_is_read_past():
    called, past = (build(formula) for formula in PAIRS["separate"])
    for model in (called, past):
        prune(model, vectors(), 0.5, recovery=Reconstruct(epochs=3), progress=False)
    torch.testing.assert_close(called.state_dict(), past.state_dict(), rtol=1e-5, atol=1e-6)
    kept = past[0].out.weight != 0
    assert not torch.allclose(past[0].out.weight[kept], build(separate)[0].out.weight[kept])
