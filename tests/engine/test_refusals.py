"""Every refusal says what was asked, what was found and what to do; and leaves the model as it was."""

import math
import re

import pytest
import torch
from support.chains import Chain, Mlp, vectors
from support.refusals import Untouched, refusal
from support.zoo import ZOO, seeded
from torch import nn

from wanda_lightning import Magnitude, prune
from wanda_lightning.methods import SEQUENTIAL_CHOICES

EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
LAYERS = [f"blocks.{index}.{part}" for index in range(4) for part in ("up", "down")] + ["head"]


def build(make=Chain):
    return seeded(lambda: make(*(Mlp() for _ in range(4))))


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
    (lambda: nn.Sequential(nn.Linear(6, 4)), {"pattern": "2:4", "only": ["0"]}, "none of the 1 layer: .*0: input"),
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


@EVERY_GRANULARITY
@pytest.mark.parametrize("batches", [None, [], Untouched()])
def test_magnitude_does_not_look_at_batches(batches, sequential):
    report = prune(build(), batches, criterion=Magnitude(), sequential=sequential, progress=False)
    assert [layer.name for layer in report.layers] == LAYERS


# ---- numbers that are not finite


def spoil(value, module, args):
    """Spoil one number of the second batch, which is the one with three samples."""
    x = args[0]
    if len(x) == 3:
        x = x.clone()
        x[1, 2, 3] = value
    return (x,)


def before(unit, sequential):
    """What is pruned when a unit is reached."""
    return () if sequential == "none" else LAYERS[: LAYERS.index(unit)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@EVERY_GRANULARITY
@pytest.mark.parametrize(
    ("place", "found"),
    [("blocks.0", "blocks.0.up"), ("blocks.2", "blocks.2.up"), ("blocks.2.down", "blocks.2.down")],
)
def test_not_finite(place, found, sequential, value):
    """No weight of the unit is written, neither that of the layer before."""
    model = build()
    model.get_submodule(place).register_forward_pre_hook(lambda *call: spoil(value, *call))
    reached = "blocks.2.up" if place == "blocks.2.down" and sequential != "layer" else found
    message = refusal(model, vectors(), sequential=sequential, written=before(reached, sequential))
    for part in (f"input of {found} holds NaN or infinity", "batch 1 ", "Check that batch", "wider dtype"):
        assert part in message


@EVERY_GRANULARITY
def test_layers_with_one_input_are_named_together(sequential):
    model, batches = ZOO["llama"].build(), ZOO["llama"].batches()
    model.model.embed_tokens.weight.data[batches[1]["input_ids"][0, 0], 5] = math.nan
    message = refusal(model, [{"input_ids": torch.full((1, 4), 2)}, batches[1]], sequential=sequential)
    parts = "q" if sequential == "layer" else "qkv"
    assert ", ".join(f"model.layers.0.self_attn.{part}_proj" for part in parts) in message


@EVERY_GRANULARITY
def test_what_is_padding_may_be_anything(sequential):
    class Masked(Chain):
        def forward(self, x, attention_mask):
            return super().forward(x.masked_fill(attention_mask[..., None] == 0, math.nan))

    batches = [{"x": x, "attention_mask": torch.tensor([[0, 1, 1]] * len(x))} for x in vectors()]
    report = prune(build(Masked), batches, sequential=sequential, progress=False)
    assert {layer.tokens for layer in report.layers} == {2 * (2 + 3 + 2)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_a_weight_that_is_not_finite(criterion, value):
    model = build()
    model.head.weight.data[1, 2] = value
    message = refusal(model, Untouched(), criterion=criterion)
    assert "head has weights that are NaN or infinite. Check the checkpoint" in message
    assert prune(model, vectors(), skip=["head"], criterion=criterion, progress=False).sparsity == 0.5


# ---- errors on the way


class Unforeseen(Exception):
    pass


@EVERY_GRANULARITY
@pytest.mark.parametrize("place", ["blocks.2", "blocks.2.down"])
def test_an_error_in_the_third_block_names_what_was_written(place, sequential):
    model = build()

    def explode(module, args):
        if len(args[0]) == 3:
            raise Unforeseen("out of luck")

    model.get_submodule(place).register_forward_pre_hook(explode)
    # Between its layers, the up-projection of the block is already done at "layer". At "block" the batches are still
    # on the way to the third block, or observed there; both before any weight of it is written.
    written = LAYERS[:5] if (place, sequential) == ("blocks.2.down", "layer") else before("blocks.2.up", sequential)
    assert refusal(model, vectors(), error=Unforeseen, sequential=sequential, written=written) == "out of luck"
