"""Every refusal says what was asked, what was found and what to do; and leaves the model as it was."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.refusals import Untouched, refusal
from support.zoo import ZOO, seeded
from torch import nn

from wanda_lightning import Magnitude, prune
from wanda_lightning.methods import SEQUENTIAL_CHOICES

EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)


class Mlp(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.between = lambda x: x

    def forward(self, x):
        return x + self.down(self.between(F.relu(self.up(x))))


class Chain(nn.Module):
    """Four blocks and a head; `glue(index, x)` comes before each block."""

    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(width) for _ in range(4))
        self.head = nn.Linear(width, 4)
        self.glue = lambda index, x: x

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(self.glue(index, x))
        return self.head(x)


LAYERS = [f"blocks.{index}.{part}" for index in range(4) for part in ("up", "down")] + ["head"]


def build(make=Chain):
    return seeded(make)


def vectors(width=8):
    """Three batches; the second is the one with three samples."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, 3, width, generator=generator) for samples in (2, 3, 2)]


def assert_says(message, *parts):
    for part in parts:
        assert str(part) in message


# ---- what was asked is impossible

ONLY = {"only": ["blocks.0.up"], "skip": ["blocks.0"]}
INFERENCE = torch.inference_mode()(lambda: nn.Sequential(nn.Linear(8, 8)))
EXPANDED = nn.Sequential(nn.Linear(8, 8, bias=False))
EXPANDED[0].weight = nn.Parameter(torch.ones(1, 8).expand(8, 8), requires_grad=False)
ROWS = [
    (INFERENCE, {}, r"but 0 was created under torch\.inference_mode\(\) and cannot change\. Build"),
    (lambda: EXPANDED, {}, r"but 0 was made by expand\(\) and repeats"),
    (lambda: build().to("meta"), {}, r"blocks\.0\.up is on the meta device\. Load the weights"),
    (
        build,
        {"pattern": "2:5", "sparsity": 0.6},
        r"NM\(n=2, m=5\) fits none of the 9 layers: .*blocks\.0\.up: input width 8 is",
    ),
    (
        lambda: build(lambda: Chain(6)),
        {"pattern": "2:4", "only": ["head"]},
        "none of the 1 layer: .*head: input",
    ),
    (nn.ReLU, {"skip": ["head"]}, "skip='head' matches no matrix of the model; the model has none"),
    (lambda: nn.Sequential(nn.ReLU()), {}, "model has nothing to prune .there are no weight matrices"),
    (lambda: nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8)), {}, "nothing to prune .0: embedding"),
    (build, {"skip": ["*"]}, r"nothing to prune .blocks\.0\.up: skip='\*'"),
    (build, ONLY, r"nothing to prune .*skip='blocks\.0'.*not in only=\['blocks\.0\.up'\]"),
]


@pytest.mark.parametrize(("make", "choices", "message"), ROWS, ids=[message for *_, message in ROWS])
def test_what_is_impossible_is_refused_before_a_batch_is_read(make, choices, message):
    for sequential in SEQUENTIAL_CHOICES:
        assert re.search(message, refusal(make(), Untouched(), sequential=sequential, **choices))


@pytest.mark.parametrize(
    ("model", "found"),
    [([torch.zeros(2, 8)], "a list"), ("name", "'name'"), (None, "None"), (Chain, "the class Chain")],
)
def test_the_model_comes_first(model, found):
    with pytest.raises(ValueError, match=rf"^model must be a torch\.nn\.Module, but it is {found}\. "):
        prune(model, build(), progress=False)


# ---- batches


@EVERY_GRANULARITY
@pytest.mark.parametrize(
    ("batches", "found"),
    [
        (lambda: None, "none were given"),
        (lambda: [], "there is none"),
        (lambda: iter(()), "there is none"),
        (lambda: (x for x in vectors() if x is None), "there is none"),
        (lambda: {}, "a dict was given"),
    ],
    ids=["None", "list", "iterator", "generator", "mapping"],
)
def test_no_batches(batches, found, sequential):
    message = refusal(build(), batches(), sequential=sequential)
    assert_says(message, "criterion='wanda'", "calibration", found)


@EVERY_GRANULARITY
def test_magnitude_does_not_look_at_batches(sequential):
    for batches in (None, [], Untouched()):
        report = prune(build(), batches, criterion=Magnitude(), sequential=sequential, progress=False)
        assert [layer.name for layer in report.layers] == LAYERS


# ---- activations

NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@NOT_FINITE
@EVERY_GRANULARITY
@pytest.mark.parametrize("place", ["batch", "between", "inside"])
def test_not_finite(place, sequential, value):
    """No weight of the unit is written, neither that of the layer before."""
    model, batches = build(), vectors()
    found = {"batch": "blocks.0.up", "between": "blocks.2.up", "inside": "blocks.2.down"}[place]
    if place == "batch":
        batches = [spoil(x, value) for x in batches]
    elif place == "between":
        model.glue = lambda index, x: spoil(x, value) if index == 2 else x
    else:
        model.blocks[2].between = lambda x: spoil(x, value)
    reached = "blocks.2.up" if place == "inside" and sequential != "layer" else found
    message = refusal(model, batches, sequential=sequential, written=before(reached, sequential))
    assert_says(message, f"input of {found} holds NaN or infinity", "batch 1 ", "Check that batch", "wider dtype")


def spoil(x, value):
    """One number of the second batch."""
    if x.shape[0] == 3:
        x = x.clone()
        x[1, 2, 3] = value
    return x


def before(unit, sequential):
    """What is pruned when a unit is reached."""
    return () if sequential == "none" else LAYERS[: LAYERS.index(unit)]


@EVERY_GRANULARITY
def test_layers_with_one_input_are_named_together(sequential):
    model, batches = ZOO["llama"].build(), ZOO["llama"].batches()
    model.model.embed_tokens.weight.data[batches[1]["input_ids"][0, 0], 5] = math.nan
    with pytest.raises(ValueError, match=r"holds NaN or infinity, .* in calibration batch 1 ") as caught:
        prune(model, [{"input_ids": torch.full((1, 4), 2)}, batches[1]], sequential=sequential, progress=False)
    parts = "q" if sequential == "layer" else "qkv"
    assert ", ".join(f"model.layers.0.self_attn.{part}_proj" for part in parts) in str(caught.value)


@EVERY_GRANULARITY
def test_what_is_padding_may_be_anything(sequential):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Chain()

        def forward(self, x, attention_mask):
            return self.net(x)

    batches = []
    for x in vectors():
        x[:, 0] = math.nan
        batches.append({"x": x, "attention_mask": torch.tensor([[0, 1, 1]] * len(x))})
    report = prune(build(Masked), batches, sequential=sequential, progress=False)
    assert {layer.tokens for layer in report.layers} == {2 * (2 + 3 + 2)}


# ---- weights


@NOT_FINITE
@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_a_weight_that_is_not_finite(criterion, value):
    model = build()
    model.blocks[3].down.weight.data[1, 2] = value
    message = refusal(model, Untouched(), criterion=criterion)
    assert_says(message, "blocks.3.down has weights that are NaN or infinite", "Check the checkpoint")


def test_a_weight_that_is_not_finite_but_left_dense():
    model = build()
    model.head.weight.data[1, 2] = math.nan
    prune(model, vectors(), skip=["head"], progress=False)


# ---- errors on the way


class Unforeseen(Exception):
    pass


@EVERY_GRANULARITY
@pytest.mark.parametrize("place", ["glue", "unit"])
def test_an_error_in_the_third_block_names_what_was_written(place, sequential):
    model = build()

    def explode(x):
        if x.shape[0] == 3:
            raise Unforeseen("out of luck")
        return x

    if place == "glue":
        model.glue = lambda index, x: explode(x) if index == 2 else x
    else:
        model.blocks[2].between = explode
    # Between its layers, the up-projection of the block is already done at "layer". At "block" the batches are still
    # on the way to the third block, or observed there; both before any weight of it is written.
    written = LAYERS[:5] if (place, sequential) == ("unit", "layer") else before("blocks.2.up", sequential)
    assert refusal(model, vectors(), error=Unforeseen, sequential=sequential, written=written) == "out of luck"
