"""Training the parts of a pruned block, against Adam written out by hand."""

from collections import defaultdict
from copy import deepcopy

import pytest
import torch
from support.layers import assert_same, rng
from support.quiet import prune
from support.recoveries import (
    AdamByHand,
    assert_close_states,
    blocks,
    pruned_with_and_without,
    some_batches,
)
from support.refusals import refusal, refuses
from support.zoo import ZOO, batches_of, cast, model_of
from torch import nn
from torch.testing import assert_close

from wanda_lightning import PruningReport, Reconstruct
from wanda_lightning.calibration.batches import batch_size, take
from wanda_lightning.training import reconstruct


def parts_of(name):
    """The layers of each part that was trained, without the name of the part."""
    report = prune(model_of(name), batches_of(name), recovery=Reconstruct(epochs=1))
    layers = defaultdict(set)
    for layer in report.layers:
        if layer.part:
            layers[layer.part.name].add(layer.name.removeprefix(f"{layer.part.name}."))
    return layers


LLAMA = {
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}


@pytest.mark.parametrize(
    ("name", "prefix", "parts"),
    [
        ("llama", "model.layers.1", LLAMA),
        (  # fc1 and fc2 lie in the block itself
            "opt",
            "model.decoder.layers.1",
            {"": {*(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.out_proj", "fc1", "fc2"}},
        ),
        (
            "t5",
            "decoder.block.1",
            {
                "layer.0": {f"SelfAttention.{x}" for x in "qkvo"},
                "layer.1": {f"EncDecAttention.{x}" for x in "qkvo"},
                "layer.2": {"DenseReluDense.wi", "DenseReluDense.wo"},
            },
        ),
    ],
)
def test_the_parts_of_a_block(name, prefix, parts):
    expected = {f"{prefix}.{part}".rstrip("."): layers for part, layers in parts.items()}
    parts = parts_of(name)
    assert {part: parts[part] for part in parts if f"{part}.".startswith(f"{prefix}.")} == expected


def test_a_layer_alone_has_no_parts():
    # Its downsampling is in its blocks.
    assert all(len(layers) > 1 for layers in parts_of("resnet18").values())
    assert not any("downsample" in part for part in parts_of("convnext"))


@torch.enable_grad()
def assert_trained(block, dense, start, batches, epochs):
    """An MLP was trained as by formula on all batches, without its biases; no early stop."""
    mlp = start.mlp
    adam = AdamByHand([mlp[0].weight, mlp[2].weight], 0.001, 0.999)
    for x in batches * epochs:
        adam.step((mlp(x) - dense.mlp(x)).square().sum())
    assert_close(block.mlp.state_dict(), mlp.state_dict(), rtol=1e-6, atol=1e-9)
    for place in (0, 2):
        assert torch.equal(block.mlp[place].bias, dense.mlp[place].bias)


@torch.no_grad()
@pytest.mark.parametrize(("count", "epochs"), [(1, 1), (3, 2), (5, 2)])
def test_it_is_adam_on_what_the_dense_part_gave(count, epochs):
    dense = blocks()
    batches = some_batches(count)
    recovery = Reconstruct(epochs=epochs, learning_rate=0.001)
    start, model, _ = pruned_with_and_without(dense, batches, recovery=recovery)
    # The fourth batch is held out.
    assert_trained(model[0], dense[0], start[0], batches[:3] + batches[4:], epochs)

    # The second block learns its own dense outputs on the outputs of the trained first block.
    inputs = [model[0](x) for x in batches]
    second = deepcopy(dense[1])
    prune(second, inputs, 0.5, sequential="none")  # the block alone, dense inside
    assert_trained(model[1], dense[1], second, inputs[:3] + inputs[4:], epochs)


@torch.no_grad()
def test_with_statistics_of_the_dense_model_it_learns_on_what_the_trained_blocks_give():
    dense = blocks()
    batches = some_batches(3)
    recovery = Reconstruct(epochs=2, learning_rate=0.001)
    start, model, report = pruned_with_and_without(
        dense, batches, recovery=recovery, sequential="none"
    )
    assert_trained(model[0], dense[0], start[0], batches, 2)
    assert_trained(model[1], dense[1], start[1], [model[0](x) for x in batches], 2)
    assert {layer.part.name for layer in report.layers} == {"0.mlp", "1.mlp"}
    assert {layer.tokens for layer in report.layers} == {48}


@pytest.mark.parametrize("name", ["llama_padded", "t5", "swin", "resnet18"])
def test_a_step_has_few_samples_of_a_batch(monkeypatch, name):
    monkeypatch.setattr(reconstruct, "_SAMPLES", 1)
    choices = {"recovery": Reconstruct(epochs=2), "sequential": "block", "keep_batch_norm": True}
    together = model_of(name).double()
    alone = model_of(name).double()
    batches = cast(batches_of(name))
    samples = [take(batch, n, n + 1) for batch in batches for n in range(batch_size(batch))]
    assert len(samples) > len(batches)
    first = prune(together, batches, **choices)
    second = prune(alone, samples, **choices)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.part == other.part or one.part.after == pytest.approx(other.part.after)
    assert_close_states(together, alone)


@pytest.mark.parametrize(("count", "size"), [(17, 9), (64, 16)])
def test_large_batches_have_pieces_of_about_one_size(count, size):
    x = torch.randn(4 * count, 8, generator=rng(1)).double()
    whole = list(x.split(count))
    pieces = [piece for batch in whole for piece in batch.split(size)]
    models = blocks(), blocks()
    for model, batches in zip(models, (whole, pieces), strict=True):
        prune(model, batches, recovery=Reconstruct(epochs=2))
    assert_close_states(*models)


class MinusTheMean(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=0)


class WithTable(nn.Module):
    """Has a table with as many rows as some batches have samples."""

    def forward(self, x):
        return x + torch.arange(40.0).to(x)[: 40 if len(x) == 40 else 1, None]


class Scored(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), kind())

    def forward(self, x):
        return x + self.mlp(x)


@pytest.mark.parametrize("kind", [MinusTheMean, WithTable])
def test_a_batch_is_not_split_if_samples_would_have_other_outputs(monkeypatch, kind):
    generator = rng(1)
    results = []
    batches = [
        torch.randn(count, 8, generator=generator).double() for count in (64, 64, 40, 64, 64)
    ]
    for largest in (reconstruct._SAMPLES, 64):
        monkeypatch.setattr(reconstruct, "_SAMPLES", largest)
        torch.manual_seed(0)
        model = nn.Sequential(Scored(kind), Scored(kind)).double()
        report = prune(model, batches, recovery="reconstruct")
        assert any(layer.part.after < layer.part.before for layer in report.layers)
        results.append(model.state_dict())
    assert_same(*results)


def test_it_stops_early_and_goes_back():
    recovery = Reconstruct(epochs=50, learning_rate=100.0)
    start, model, report = pruned_with_and_without(blocks(), some_batches(8), recovery=recovery)
    assert_same(model, start)
    part = report.layers[0].part
    assert part.name == "0.mlp"
    assert part.before == part.after > 0


class Sometimes(nn.Module):
    """Calls its second layer for some inputs only."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.first(x) + (self.second(x) if x[0, 0] > 0 else 0)


def test_a_layer_that_some_batches_do_not_reach():
    model = blocks()
    batches = some_batches(8)
    assert {bool(batch[0, 0] > 0) for batch in batches} == {True, False}
    for block in model:
        block.mlp = Sometimes().to(torch.float64)
    start, model, _ = pruned_with_and_without(model, batches, recovery="reconstruct")
    for name in ("first", "second"):
        before = start[0].mlp.get_submodule(name).weight
        after = model[0].mlp.get_submodule(name).weight
        assert torch.equal(before == 0, after == 0)
        assert not torch.equal(before, after)


class WritesIntoItsInput(Sometimes):
    def forward(self, x):
        return self.second(self.first(x.add_(1)))


def test_a_part_that_writes_into_its_input_reproduces_itself():
    model = blocks()
    batches = some_batches(5)
    for block in model:
        block.mlp = WritesIntoItsInput().to(torch.float64)
    report = prune(model, batches, 0.0, recovery="reconstruct")
    notes = [layer.remarks for layer in report.layers]
    assert notes == [f"error of {i}.mlp 0.00%, trained 0.00%" for i in (0, 0, 1, 1)]
    assert notes[0] in report.table()
    assert PruningReport.from_json(report.to_json()) == report


def test_padding_teaches_nothing():
    padded = ZOO["llama_padded"]
    others = deepcopy(padded.batches())
    for batch in others:
        batch["input_ids"][batch["attention_mask"] == 0] = 77
    models = padded.build(), padded.build()
    for model, batches in zip(models, (padded.batches(), others), strict=True):
        prune(model, batches, 0.5, recovery="reconstruct")
    assert_close_states(*models)


class WithoutSlope(nn.Linear):
    """A layer with a gradient of NaN."""

    def forward(self, x):
        return super().forward(x + (x * 0).sum().abs().sqrt())


def test_the_report_names_a_part_that_was_not_trained(caplog):
    model = blocks(torch.float32)
    batches = some_batches(4, torch.float32)
    model[1].mlp.append(WithoutSlope(8, 8))
    start, model, report = pruned_with_and_without(
        model, batches, recovery="reconstruct", skip="1.mlp.3"
    )
    assert torch.equal(model[1].mlp[0].weight == 0, start[1].mlp[0].weight == 0)
    why = "the gradient of step 1 was not finite"
    assert "stopped" not in report.layers[0].remarks
    assert f"training stopped: {why}" in report.layers[-1].remarks
    assert (
        f"the training of 1 part stopped, 1.mlp first: {why}. 1 of them keep the weights"
        in report.notes[-1]
    )
    assert report.notes[-1] in caplog.text


def test_what_it_cannot_do_is_refused():
    message = "recovery='reconstruct' cannot be combined with sequential='layer', because"
    assert message in refusal(blocks(), some_batches(2), recovery="reconstruct", sequential="layer")
    message = "since recovery='reconstruct' reads calibration data, but none were"
    assert message in refusal(blocks(), None, criterion="magnitude", recovery="reconstruct")
    with refuses("of Reconstruct must be a"):
        Reconstruct(epochs=0)
