"""Calibration batches as forward passes: which are refused, and what an error in one says."""

import copy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.refusals import refusal
from support.zoo import ZOO
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from wanda_lightning import prune
from wanda_lightning.calibration.batches import batch_size, forward_batch, is_even, map_tensors
from wanda_lightning.calibration.samples import Samples, fit_together
from wanda_lightning.parallel import SINGLE_PROCESS


class Two(nn.Module):
    """A model of two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        return self.second(self.first(x) + y)


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def test_a_pair_of_parentheses_too_many():
    assert "one got a tuple. Give batches as the model's forward takes them" in refusal(mlp(), [((torch.ones(2, 8),),)])


def test_a_forward_of_ones_own_may_take_anything():
    model = mlp()
    report = prune(
        model, ["3", "4"], forward=lambda text: model(torch.full((2, 8), float(text))), sparsity=0.5, progress=False
    )
    assert report.sparsity == 0.5


def test_a_mapping_gives_a_model_all_that_it_needs():
    x = torch.ones(2, 8)
    assert prune(Two(), [{"x": x, "y": x}], sparsity=0.5, progress=False).sparsity == 0.5


class Fragile(nn.Module):
    """Its middle fails for some inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if len(x) == 3:
            raise RuntimeError("three is too many")
        return self.second(self.first(x))


def notes_of(error):
    return " ".join(getattr(error, "__notes__", ()))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
@pytest.mark.parametrize(("sequential", "unit"), [("block", "0, in "), ("layer", ""), ("none", "")])
def test_an_error_in_the_model_names_the_batch_and_the_unit(sequential, unit):
    blocks = nn.Sequential(Fragile(), Fragile())
    with pytest.raises(RuntimeError, match="three is too many") as caught:
        prune(blocks, [torch.ones(2, 8), torch.ones(3, 8)], sequential=sequential, progress=False)
    assert f"This happened in {unit}calibration batch 1 (counted from 0): " in notes_of(caught.value)
    assert "(3, 8)" in notes_of(caught.value)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_a_batch_of_another_width_names_layer_and_batch(sequential):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"input of 0 has shape \(2, 7\) and the layer takes 8 features") as caught:
        prune(model, [torch.ones(2, 8), torch.ones(2, 7)], sequential=sequential, progress=False)
    assert f"{'0, in ' if sequential == 'layer' else ''}calibration batch 1" in notes_of(caught.value)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize(
    ("batches", "forward"),
    [
        ([torch.ones(0, 8)], None),
        ([torch.ones(2, 8)], lambda batch: None),
    ],
    ids=["empty tensors", "a forward that does nothing"],
)
def test_nothing_that_reaches_the_layers_is_an_error(sequential, batches, forward):
    message = refusal(mlp(), batches, forward=forward, sequential=sequential)
    assert "no token except padding reached any of the 2 layers, so nothing was pruned" in message


def test_zeros_alone_are_an_error():
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    assert "only zeros reached any of the 2 layers, so nothing was pruned" in refusal(layers, [torch.zeros(4, 8)])


def test_a_stream_of_unknown_length_is_read():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    streamed = mlp()
    held = copy.deepcopy(streamed)
    prune(streamed, DataLoader(Stream(), batch_size=2), 0.5)
    prune(held, list(DataLoader(Stream(), batch_size=2)), 0.5)
    assert all(map(torch.equal, streamed.parameters(), held.parameters()))


def test_padding_alone_is_an_error():
    specimen = ZOO["llama_padded"]
    batch = {key: 0 * value for key, value in specimen.batches()[0].items()}
    assert "so nothing was pruned" in refusal(specimen.build(), [batch])


def test_the_number_of_batches_that_were_read_is_shown(capsys):
    prune(mlp(), (torch.ones(2, 8) for _ in range(5)), sparsity=0.5)
    assert "Reading batches 5" in capsys.readouterr().err
    prune(mlp(), [torch.ones(2, 8)], sparsity=0.5)
    assert "Reading batches" not in capsys.readouterr().err


def test_one_batch_in_place_of_a_list():
    assert "batches must be a list of batches or a dataloader" in refusal(mlp(), torch.ones(2, 8))
    assert "but a str was given" in refusal(mlp(), "text")


def test_what_a_mapping_holds_beyond_the_forward_is_left_out():
    x = torch.ones(2, 8)
    model = Two()
    assert torch.equal(forward_batch(model, {"x": x, "y": x, "labels": x}), model(x, x))
    with pytest.raises(ValueError, match=r"batches hold \['labels'\], but Two.forward takes \['x', 'y'\]"):
        forward_batch(model, {"labels": x})


def test_every_tensor_of_a_batch_is_mapped_and_its_containers_stay():
    from collections import namedtuple

    Pair = namedtuple("Pair", "a b")
    one, two = torch.tensor(1), torch.tensor(2)
    assert map_tensors(lambda x: x + 1, {"pair": Pair(one, "text"), "list": [(one, 3)]}) == {
        "pair": Pair(two, "text"),
        "list": [(two, 3)],
    }


def test_which_batches_can_be_split():
    x = torch.ones(2, 8)
    assert is_even({"x": x, "more": [x, (x,)], "number": 3, "text": "a", "scalar": torch.tensor(1)})
    assert not is_even({"x": x, "y": torch.ones(3)})
    assert not is_even({"x": x, "texts": ["a", "b"]})
    assert not is_even((x, [3, 4]))
    assert not is_even(["a"])


def three_sections(batch):
    assert len(batch["positions"]) == 3  # as Qwen2-VL's positions, (3, samples, tokens)
    return batch["x"]


def fails(batch):
    raise RuntimeError


X3 = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        *(
            (forward, 3)
            for forward in (torch.relu, lambda x: x.flatten(0, 1), lambda x: x * torch.nan, torch.sum, fails)
        ),
        *((forward, 1) for forward in (lambda x: x.cumsum(0), lambda x: x.flip(0).cumsum(0), lambda x: x.mean(0))),
    ],
)
def test_entries_of_a_batch_that_do_not_run_alone_are_no_samples(forward, count, caplog):
    _, samples = samples_of(X3, X3, forward=forward)
    assert [sample.size for sample in samples] == [1] * 2 * count
    assert caplog.text.count("each batch runs whole") == (count == 1)
    assert fit_together(samples) == (count > 1)


def test_positions_of_three_sections_are_not_those_of_three_samples():
    data, (sample,) = samples_of({"x": X3, "positions": X3}, forward=three_sections)
    assert sample.predict() is X3
    assert [each.size for each in data.first(2)] == [1]


IMAGES = [torch.ones(3, 8, 8), torch.ones(3, 6, 9)]
BOXES = [{"boxes": torch.ones(3, 4)}, {"boxes": torch.ones(3, 4)}]


@pytest.mark.parametrize(
    "batch",
    [(IMAGES, BOXES), [tuple(IMAGES), tuple(BOXES)], (IMAGES,), {"images": IMAGES, "targets": BOXES, "scale": 2}],
    ids=["pair", "tuples", "alone", "mapping"],
)
def test_a_list_of_images_is_one_sample_for_each_image_and_not_divided(batch):
    assert batch_size(batch) == 2
    assert not is_even(batch)
    _, (sample,) = samples_of(batch)
    assert sample.size == 2
    assert sample.predict() is batch


@pytest.mark.parametrize(
    "batch",
    [
        [torch.ones(3, 8, 8), torch.ones(3, 8, 8)],
        ((torch.ones(3, 8, 8), torch.ones(3, 8, 8)), torch.ones(3)),
        {"x": [torch.ones(3, 8, 8)], "y": torch.ones(3)},
        ([torch.ones(3, 8), torch.ones(3, 8)],),
    ],
    ids=["columns", "columns beside labels", "mapping", "two dimensions"],
)
def test_columns_are_no_images(batch):
    assert batch_size(batch) == 3
    assert is_even(batch)


def samples_of(*batches, forward=lambda batch: batch):
    data = Samples(mlp(), batches, forward, None, SINGLE_PROCESS, "a test")
    return data, [sample for batch in data for sample in data.split(batch)]


def test_samples_of_several_batches_run_as_one():
    def batch(*rows):
        return {"x": torch.tensor(rows)[:, None], "more": [torch.tensor(rows), (torch.tensor(5), "name")], "flag": True}

    data, samples = samples_of(batch(0, 1), batch(2, 3, 4))
    assert len(samples) == 5
    chosen = [samples[index] for index in (3, 0, 4)]
    assert fit_together(chosen)
    joined = data.join(chosen)
    assert (joined.size, joined.batch_index) == (3, 1)
    assert str(joined.predict()) == str(batch(3, 0, 4))


X = {"x": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, {"x": torch.ones(1, 3)}),
        (X, {"x": torch.ones(1, 2).double()}),
        (X, {"y": torch.ones(1, 2)}),
        ({**X, "scale": torch.tensor(1)}, {**X, "scale": torch.tensor(2)}),
        ({**X, "text": ["a"]}, {**X, "text": ["a"]}),
        (X, torch.ones(1, 2)),
    ],
    ids=["shape", "dtype", "key", "number", "text", "kind"],
)
def test_samples_that_differ_run_alone(one, other):
    _, samples = samples_of(one, other)
    assert not fit_together(samples)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_the_first_samples_are_the_same_for_any_number_of_processes(batch_size):
    """If a sampler deals them in turn, as Lightning's does."""
    for world_size in (1, 2, 3, 8, 9):
        found = []
        for rank in range(world_size):
            batches = torch.arange(40)[rank::world_size].split(batch_size)
            counts = [[min(8, len(range(40)[other::world_size]))] for other in range(world_size)]
            processes = SimpleNamespace(
                rank=rank, world_size=world_size, fail_together=nullcontext, all_gather=lambda _, counts=counts: counts
            )
            data = Samples(mlp(), batches, lambda batch: batch, None, processes, "test")
            found += [number for sample in data.head(8) for number in sample.predict().tolist()]
        assert sorted(found) == list(range(8))
