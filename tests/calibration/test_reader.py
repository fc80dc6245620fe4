"""What is read of the inputs: packed documents, inputs that are never active, NaN, and the precision of the sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.samples import samples_of
from support.zoo import ZOO
from torch import nn

from wanda_lightning import NM, OWL, RIA, Unstructured, prune
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.unit_stops import whole_model_calls
from wanda_lightning.core.criteria import Saliency
from wanda_lightning.core.solvers import SparseGPT, ZeroOut
from wanda_lightning.methods import SEQUENTIAL_CHOICES, SOLVERS
from wanda_lightning.models import Unit, find_layers

EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)


def statistics_of(model, batches, needs=("square_sum", "gram")):
    """What enters each layer of the dense model, as pruning would read it."""
    layers = find_layers(model).layers
    with torch.no_grad():
        return Observer(frozenset(needs))(Unit("", None, layers), whole_model_calls(samples_of(model, batches)))


# ---- packed batches


def documents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (1, length), generator=generator) for length in (9, 4, 11)]


def packed(filler=0):
    ids = torch.cat([*documents(), torch.full((1, filler), 5)], dim=1)
    position = torch.cat([torch.arange(d.shape[1]) for d in documents()] + [torch.arange(filler)])[None]
    return {"input_ids": ids, "position_ids": position}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_packed_documents_give_the_statistics_of_the_documents(name):
    """transformers takes position_ids that start again for documents, and lets none see the others."""
    model = ZOO[name].build().double()
    alone = statistics_of(model, [{"input_ids": ids} for ids in documents()])
    together = statistics_of(model, [packed()])
    assert alone.keys() == together.keys() != set()
    for layer, expected in alone.items():
        assert together[layer].count == expected.count == 9 + 4 + 11
        for sums in ("square_sum", "gram"):
            torch.testing.assert_close(together[layer].sums[sums], expected.sums[sums], rtol=1e-9, atol=1e-12)


def test_only_the_attention_mask_says_what_is_padding():
    """A tail whose positions start again may be one more document: it counts, unless the mask leaves it out."""
    model = ZOO["llama"].build()
    assert {s.count for s in statistics_of(model, [packed(filler=6)]).values()} == {24 + 6}
    batch = packed(filler=6)
    batch["attention_mask"] = (torch.arange(30) < 24).long()[None]
    assert {s.count for s in statistics_of(model, [batch]).values()} == {24}


class Masked(nn.Module):
    """Takes whatever stands in a batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, attention_mask, position_ids=None):
        return self.layer(x)


def test_a_mask_of_document_numbers_leaves_out_its_zeros():
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 2, 2, 0], [0, 1, 1, 2, 3]])
    report = prune(Masked(), [{"x": x, "attention_mask": mask}], progress=False)
    assert report.layers[0].tokens == 4 + 4


# ---- inputs that are never active


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 12)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Blocks(nn.Module):
    """Of what enters blocks.0.down, some inputs are never active; where `closed`, none is."""

    DEAD = (0, 1, 6, 9, 14, 15)

    def __init__(self, closed=False):
        super().__init__()
        self.blocks = nn.ModuleList([Gated(), Gated()])
        with torch.no_grad():
            self.blocks[0].up.bias[list(range(16) if closed else self.DEAD)] = -100
            self.blocks[0].down.weight[:, list(self.DEAD)] *= 50  # the largest weights, for nothing

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x)[..., :8])


def build(closed=False, make=Blocks):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make(closed)


def vectors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 7, 8, generator=generator) for n in (3, 2)]


CHOOSERS = {
    "wanda": {},
    "ria": {"criterion": RIA()},
    "saliency": {"criterion": Saliency()},
    "owl": {"allocation": OWL()},
    **{name: {"solver": name} for name in SOLVERS},
}


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", CHOOSERS)
def test_inputs_that_are_never_active_go_first(name, pattern):
    model = build()
    report = prune(model, vectors(), 0.5, pattern=pattern, **CHOOSERS[name], progress=False)
    kept = model.blocks[0].down.weight != 0
    assert not kept[:, list(Blocks.DEAD)].any()
    if name != "owl":
        assert kept.float().mean() == 0.5
    (entry,) = [layer for layer in report.layers if layer.name == "blocks.0.down"]
    assert entry.note.startswith("6 inputs never active")


def test_inactive_inputs_are_counted_over_all_batches():
    model, active = build(), {}
    for name in (layers := [f"blocks.{i}.{part}" for i in range(2) for part in ("up", "down")]):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: active.setdefault(name, []).append((args[0] != 0).any(dim=(0, 1)))
        )
    report = prune(model, vectors(), sequential="none", progress=False)
    inactive = {name: int((~torch.stack(active[name]).any(dim=0)).sum()) for name in layers}
    assert inactive["blocks.0.down"] == 6 < sum(inactive.values())
    notes = {name: f"{count} inputs never active" if count else "" for name, count in inactive.items()}
    assert {layer.name: layer.note for layer in report.layers} == notes


def test_notes_of_a_layer_add_up():
    model = build(make=lambda closed: _Shortened(Blocks(closed)))
    x = vectors()[0]
    batch = {"x": x, "attention_mask": torch.ones(x.shape[:2]).tril()}
    report = prune(model, [batch], progress=False)
    (entry,) = [layer for layer in report.layers if layer.name == "net.blocks.0.down"]
    padding = "padding counted: the attention_mask does not show which inputs are padding"
    assert entry.note == f"6 inputs never active; {padding}"


class _Shortened(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, attention_mask):
        return self.net(x[:, 1:])


# ---- layers without active inputs


@EVERY_GRANULARITY
@pytest.mark.parametrize("solver", [ZeroOut(), SparseGPT()], ids=str)
def test_a_layer_whose_inputs_are_all_zero_stays_dense(sequential, solver, caplog):
    model = build(closed=True)
    before = model.blocks[0].down.weight.clone()
    report = prune(model, vectors(), solver=solver, sequential=sequential, progress=False)
    assert torch.equal(model.blocks[0].down.weight, before)
    assert {m.name: m.detail for m in report.skipped} == {"blocks.0.down": "all its inputs were zero"}
    note = "all inputs were zero in 1 layer, blocks.0.down first: left dense"
    assert note in report.notes
    assert note in caplog.text
    assert {layer.name for layer in report.layers} == {"blocks.0.up", "blocks.1.up", "blocks.1.down"}
    assert report.parameters == sum(p.numel() for p in model.parameters())


class DeadGroup(nn.Module):
    """The second group of the convolution never sees anything."""

    def __init__(self, closed=False):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x):
        return self.conv(self.first(x) * (torch.arange(8) < 4)[:, None, None])


def test_a_group_whose_inputs_are_all_zero_stays_dense():
    model = build(make=DeadGroup)
    report = prune(model, [torch.randn(2, 3, 5, 5)], progress=False)
    assert [layer.name for layer in report.layers] == ["conv.group0"]
    assert {m.name: m.shape for m in report.skipped if "zero" in m.detail} == {"conv.group1": (4, 4, 3, 3)}
    assert model.conv.weight[4:].all()
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.zeros == 4 * 18 == int((model.conv.weight == 0).sum())


# ---- NaN and infinity


class Spoiling(nn.Module):
    """Linear layers and a convolution; one number between them is spoiled."""

    def __init__(self, spoil, between):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.conv = nn.Conv2d(8, 8, (1, 2))
        self.spoil, self.between = spoil, between

    def forward(self, x, attention_mask=None):
        y = self.first(x)
        if self.between == "flat":
            y = y.flatten(0, 1)
        if self.between == "images":
            return self.conv(self.spoil(y.unsqueeze(1).expand(-1, 3, -1, -1)).permute(0, 3, 1, 2))
        return self.second(self.spoil(y))


def spoiled(*index, value=math.nan, when=3):
    def spoil(x):
        if x.shape[0] % when:  # another batch
            return x
        x = x.clone()
        x[index] = value
        return x

    return spoil


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("between", "index"), [("", (2, 4, 1)), ("flat", (10, 3)), ("images", (1, 0, 3, 2)), ("images", (2, 2, 0, 0))]
)
@EVERY_GRANULARITY
def test_nan_and_infinity_are_found(sequential, between, index, mask, value):
    model = Spoiling(spoiled(*index, value=value), between).float()
    batches = [{"x": torch.randn(n, 5, 4)} for n in (2, 3)]
    if mask:
        batches[1]["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"holds NaN or infinity.*in calibration batch 1 \(counted from 0\)") as caught:
        prune(model, batches, sequential=sequential, progress=False)
    assert f"the input of {'conv' if between == 'images' else 'second'} holds" in str(caught.value)


# ---- wide enough


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY_GRANULARITY
def test_a_massive_channel_is_pruned_by(sequential, dtype):
    """Its weights survive in every row, however small: 1e5² is beyond float16, and bfloat16 would lose the others."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)).to(dtype)
    x = torch.randn(4, 50, 8).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
        model[1].weight[:, 3] = 0.01
    x[..., 3] = 30000
    prune(model, [x], only=["1"], sequential=sequential, progress=False)
    assert model[1].weight.dtype == dtype
    assert model[1].weight[:, 3].all()
    assert (model[1].weight == 0).sum(dim=1).eq(4).all()


def test_a_difference_that_float32_cannot_see():
    """Two inputs whose norms differ in the tenth digit: float64 decides between their weights."""
    layer = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.tensor([[1 + 1e-10, 1.0]], dtype=torch.float64)
    prune(nn.Sequential(layer), [x], progress=False)
    assert layer.weight.tolist() == [[1.0, 0.0]]
