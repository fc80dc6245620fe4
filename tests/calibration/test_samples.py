"""Calibration batches as forward passes: which are refused, and what an error in one says."""

import pytest
import torch
from support.chains import Chain, Mlp
from support.layers import rng
from support.quiet import prune
from support.refusals import refusal
from support.zoo import batches_of, model_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from wanda_lightning.calibration.batches import batch_size, is_even
from wanda_lightning.calibration.samples import Samples, fit_together, forward_batch
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.parallel import SINGLE_PROCESS

X8 = torch.ones(2, 8)
PADDING = [{key: 0 * value for key, value in batches_of("llama_padded")[0].items()}]


def mlp(bias=True):
    return nn.Sequential(nn.Linear(8, 8, bias), nn.ReLU(), nn.Linear(8, 8, bias))


# ---- what is refused


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize(
    ("batches", "choices", "message"),
    [
        (None, {}, "since criterion='wanda' reads calibration data, but none were given"),
        (
            None,
            {"criterion": "magnitude", "allocation": "fisher"},
            "since allocation='fisher' reads calibration data",
        ),
        ([], {}, "at least one calibration batch for criterion='wanda', but there is none"),
        (
            iter(()),
            {"criterion": "magnitude", "allocation": "owl"},
            "for allocation='owl', but there is none",
        ),
        ({}, {}, "but a dict was given"),
        ("text", {}, "but a str was given"),
        (X8, {}, "batches must be a list of batches or a dataloader"),
        (
            [X8[:0]],
            {},
            "no token except padding reached any of the 2 layers, so nothing was pruned",
        ),
        (
            [X8],
            {"forward": lambda batch: None},
            "no token except padding reached any of the 2 layers",
        ),
        ([0 * X8], {}, "only zeros reached any of the 2 layers, so nothing was pruned"),
        (PADDING, {}, "so nothing was pruned"),
    ],
)
def test_batches_that_say_nothing_of_the_layers_are_refused(batches, choices, message, sequential):
    model = model_of("llama") if batches is PADDING else mlp(bias=False)
    assert message in refusal(model, batches, sequential=sequential, **choices)


def explode(module, args):
    if len(args[0]) == 3:
        raise RuntimeError("three is too many")


@pytest.mark.parametrize(
    ("sequential", "samples", "place"),
    [
        ("block", 3, "blocks.0, in "),
        ("layer", 3, ""),
        ("none", 3, ""),
        ("block", 2, "blocks.0, in "),
        ("layer", 2, "blocks.0.up, in "),
        ("none", 2, ""),
    ],
)
def test_an_error_names_the_batch_and_the_unit(sequential, samples, place):
    model = Chain(Mlp(), Mlp())
    shape = (samples, 8 if samples == 3 else 7)
    model.blocks[0].down.register_forward_pre_hook(explode)
    with pytest.raises(
        (RuntimeError, ValueError), match=r"three is too many|cannot be multiplied|must match"
    ) as caught:
        prune(model, [X8, X8, torch.ones(shape)], sequential=sequential)
    assert (
        f"This happened in {place}calibration batch 2 (counted from 0), with shapes {shape}."
        in " ".join(caught.value.__notes__)
    )


# ---- how a model is called


def test_what_a_mapping_holds_beyond_the_forward_is_left_out():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    assert torch.equal(forward_batch(Two(), {"x": X8, "y": X8, "labels": X8}), 2 * X8)


def test_a_stream_of_unknown_length_is_read():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from torch.ones(4, 8)

    assert prune(mlp(), DataLoader(Stream(), batch_size=2), 0.5).layers[0].tokens == 4


# ---- samples

IMAGES = [torch.ones(3, 8, 8), torch.ones(3, 6, 9)]
BOXES = [{"boxes": torch.ones(3, 4)}, {"boxes": torch.ones(3, 4)}]
COLUMNS = [torch.ones(3, 8, 8), torch.ones(3, 8, 8)]


def samples_of(*batches, forward=lambda batch: batch):
    data = Samples(mlp(), batches, forward, None, SINGLE_PROCESS, "a test")
    return data, [sample for batch in data for sample in data.split(batch)]


@pytest.mark.parametrize(
    ("batch", "size", "even"),
    [
        (
            {"x": X8, "more": [X8, (X8,)], "number": 3, "text": "a", "scalar": torch.tensor(1)},
            2,
            True,
        ),
        ({"x": X8, "y": torch.ones(3)}, 2, False),
        ({"x": X8, "texts": ["a", "b"]}, 2, False),
        ((X8, [3, 4]), 2, False),
        ((IMAGES, BOXES), 2, False),
        ([tuple(IMAGES), tuple(BOXES)], 2, False),
        ((IMAGES,), 2, False),
        ({"images": IMAGES, "targets": BOXES, "scale": 2}, 2, False),
        (COLUMNS, 3, True),
        (([torch.ones(3, 8), torch.ones(3, 8)],), 3, True),
    ],
)
def test_the_size_of_a_batch_and_whether_it_can_be_split(batch, size, even):
    """A list of images is one sample for each image, which is not divided; columns are no images."""
    assert (batch_size(batch), is_even(batch)) == (size, even)
    _, samples = samples_of(batch)
    assert [sample.size for sample in samples] == ([1] * size if even else [size])
    assert even or samples[0].batch is batch


def fails(batch):
    raise RuntimeError


X3 = torch.randn(3, 4, 8, generator=rng())


# Functions whose samples have the same results alone, or no predictions, or that fail anyway.
ALONE = (torch.relu, lambda x: x.flatten(0, 1), lambda x: x * torch.nan, torch.sum, fails)
TOGETHER = (
    lambda x: x.flip(0).cumsum(0),
    lambda x: x.mean(0),
)


@pytest.mark.parametrize("forward", [*ALONE, *TOGETHER])
def test_entries_of_a_batch_that_do_not_run_alone_are_no_samples(forward, caplog):
    count = 3 if forward in ALONE else 1
    _, samples = samples_of(X3, X3, forward=forward)
    assert [sample.size for sample in samples] == [1] * 2 * count
    assert caplog.text.count("each batch runs whole") == (count == 1)
    assert fit_together(samples) == (count > 1)


def test_positions_of_three_sections_are_not_those_of_three_samples():
    def forward(batch):
        assert len(batch["positions"]) == 3  # as Qwen2-VL's positions, (3, samples, tokens)
        return batch["x"]

    data, (sample,) = samples_of({"x": X3, "positions": X3}, forward=forward)
    assert torch.equal(sample.predict(), X3)
    assert [each.size for each in data.first_batches(2)] == [1]


def test_samples_of_several_batches_run_as_one():
    """Tensors are joined by their keys, in whatever order a batch has them."""

    def batch(*rows):
        return {
            "x": torch.tensor(rows)[:, None],
            "more": [torch.tensor(rows), (torch.tensor(5), "name")],
            "flag": True,
        }

    data, samples = samples_of(batch(0, 1), dict(reversed(batch(2, 3, 4).items())))
    chosen = [samples[index] for index in (3, 0, 4)]
    assert fit_together(chosen)
    joined = data.join(chosen)
    assert (joined.size, joined.batch_index) == (3, 1)
    assert str(sorted(joined.predict().items())) == str(sorted(batch(3, 0, 4).items()))


X = {"x": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, {"x": torch.ones(1, 3)}),
        (X, {"x": torch.ones(1, 2).double()}),
        (X, {"y": torch.ones(1, 2)}),
        (X | {"scale": torch.tensor(1)}, X | {"scale": torch.tensor(2)}),
        (X | {"text": ["a"]}, X | {"text": ["a"]}),
        (X, torch.ones(1, 2)),
    ],
)
def test_samples_that_differ_run_alone(one, other):
    _, samples = samples_of(one, other)
    assert not fit_together(samples)
