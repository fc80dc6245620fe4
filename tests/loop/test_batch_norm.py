"""The correction of BatchNorm statistics, against a slow version that keeps all inputs of all layers."""

from copy import deepcopy
from functools import partial
from itertools import repeat

import pytest
import torch
from support import reference
from support.detectors import retinanet, scenes
from support.layers import assert_same, rng
from support.pair_cases import prune_batch_norms
from support.quiet import prune
from support.refusals import Untouched, state_of
from support.samples import calls_of
from support.zoo import ZOO, cast, model_of, run, seeded
from timm.layers import BatchNormAct2d
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d, Permute

from wanda_lightning import Distill
from wanda_lightning.loop import batch_norm
from wanda_lightning.loop.batch_norm import batch_norm_layers


def statistics(model):
    """The running means and variances, in float64."""
    return [(x.running_mean.double(), x.running_var.double()) for x in batch_norm_layers(model)]


close = partial(assert_close, rtol=1e-5, atol=1e-6)


def moments(inputs):
    """The mean and unbiased variance of each channel over some inputs, in float64."""
    rows = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    return rows.mean(1), rows.var(1)


@torch.no_grad()
def slow(dense, pruned, batches):
    """The statistics of the pruned model, which has those of the dense one, after the correction of a copy."""
    model = deepcopy(pruned)
    layers = set(batch_norm_layers(dense))
    layers = {name: layer for name, layer in dense.named_modules() if layer in layers}
    before = calls_of(dense, layers, batches)
    after = {name: [] for name in layers}

    def correct(name, layer, args):
        after[name].append(args[0])
        (m, v), (new_m, new_v) = (
            moments([x for (x,) in before[name][: len(after[name])]]),
            moments(after[name]),
        )
        s = torch.where(v > 0, new_v / v, 1.0).clamp(max=1)
        layer.running_mean.copy_(new_m + s.sqrt() * (layers[name].running_mean.double() - m))
        layer.running_var.copy_(new_v + s * (layers[name].running_var.double() - v))

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(partial(correct, name))
    for batch in batches:
        run(model, batch)
    return statistics(model)


def changed(model, other):
    """Whether each layer has other running means."""
    pairs = zip(statistics(model), statistics(other), strict=True)
    return [not torch.equal(one, two) for (one, _), (two, _) in pairs]


def both(dense, batches, sparsity=0.5, **choices):
    """Prune without and with the correction."""
    without = deepcopy(dense)
    corrected = deepcopy(dense)
    prune(without, batches, sparsity, keep_batch_norm=True, **choices)
    report = prune(corrected, batches, sparsity, **choices)
    return without, corrected, report


def resnet():
    """A model in float64, in which rounding does not grow from layer to layer."""
    return model_of("resnet18").double()


def random(shape, sizes):
    generator = rng(1)
    return [torch.randn(size, *shape, generator=generator).double() for size in sizes]


def images(*sizes):
    return random((3, 32, 32), sizes)


def vectors(*sizes):
    return [x + 0.5 for x in random((5, 6), sizes)]


def notes(report):
    return [note for note in report.notes if "BatchNorm" in note]


def one_layer(norm, dims=0):
    """A pruned matrix, whose output a BatchNorm layer normalizes as (tokens, channels), or with places behind those."""
    if dims == 0:
        return nn.Sequential(nn.Linear(6, 8), nn.Flatten(0, 1), norm, nn.Linear(8, 3))
    places = nn.Unflatten(2, (5, *repeat(1, dims - 1)))
    to_channels = Permute([0, 2, 1])
    return nn.Sequential(
        nn.Linear(6, 8), to_channels, places, norm, nn.Flatten(1), nn.Linear(40, 3)
    )


def twice():
    """A block with a BatchNorm layer that runs twice."""
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    return nn.Sequential(nn.Flatten(0, 1), block, block, nn.Linear(6, 3))


def warmed(model):
    """Set the running statistics to values that a training could give."""
    torch.manual_seed(3)
    for layer in batch_norm_layers(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


LINEAR = {"only": ["0"]}
MAGNITUDE = {"method": "magnitude"}
FROZEN = partial(seeded, partial(retinanet, FrozenBatchNorm2d))
# A model, its batches, choices, and a dtype.
CASES = [
    (ZOO["resnet18"].build, images(2, 0, 3), MAGNITUDE, torch.float64),
    (ZOO["resnet18"].build, images(2, 3), {"sequential": "layer"}, torch.float64),
    # Batches of a detector are lists of images of different sizes; its layers are frozen if its weights were trained.
    (FROZEN, scenes(2, 3), MAGNITUDE, torch.float64),
    (twice, vectors(3, 4), {"only": ["1.0"], "sequential": "none"}, torch.float64),
    (partial(one_layer, nn.BatchNorm1d(8)), vectors(3, 4), LINEAR, torch.bfloat16),
]
# A layer, and the number of its dimensions behind the channels.
LAYERS = [
    (nn.BatchNorm1d(8), 0),
    (nn.BatchNorm1d(8, momentum=None), 1),
    (nn.BatchNorm2d(8, affine=False), 2),
    (nn.BatchNorm3d(8), 3),
    (nn.SyncBatchNorm(8), 2),
    (BatchNormAct2d(8), 2),
]
CASES += [(partial(one_layer, *row), vectors(3, 4), LINEAR, torch.float64) for row in LAYERS]


@pytest.mark.parametrize(("make", "batches", "choices", "dtype"), CASES)
def test_it_equals_the_slow_version(make, batches, choices, dtype, monkeypatch):
    monkeypatch.setattr(batch_norm, "_AT_ONCE", 5000)  # some layers have more, the others less
    dense = warmed(make()).to(dtype)
    batches = cast(batches, dtype)
    without, corrected, report = both(dense, batches, **choices)
    assert all(map(torch.equal, without.parameters(), corrected.parameters()))
    assert_same(statistics(without), statistics(dense))
    assert any(changed(corrected, dense))
    rtol = 1e-5 if dtype == torch.float64 else 2**-7
    close(statistics(corrected), slow(dense, without, batches), rtol=rtol)
    (note,) = notes(report)
    assert note.startswith(f"the statistics of {len(statistics(dense))} BatchNorm layer")
    assert note.endswith("; no predictions of held-out samples to compare")
    assert state_of(corrected) == state_of(dense)


def test_nothing_changes_where_nothing_is_pruned():
    dense = resnet().float()
    batches = cast(images(4, 5), torch.float32)
    _, corrected, _ = both(dense, batches, **MAGNITUDE, only=["layer3.*", "layer4.*"])
    first = changed(dense, corrected).index(True)
    assert list(batch_norm_layers(dense))[first] is dense.layer3[0].bn1


def distances(dense, models, samples):
    """The mean over some samples of the divergence of each model's predictions from those of the dense one."""
    with torch.no_grad():
        expected, *others = (model.eval()(torch.stack(samples)) for model in (dense, *models))
    return [float(reference.divergence(logits, expected)) for logits in others]


def test_every_eighth_sample_is_held_out():
    dense = resnet()
    batches = images(4, 4, 8)
    without, corrected, report = both(dense, batches, 0.7, **MAGNITUDE)
    close(statistics(corrected), slow(dense, without, [batches[0], batches[1][:3], batches[2][:7]]))
    before, after = distances(dense, (without, corrected), [batches[1][3], batches[2][7]])
    assert after < before
    (note,) = notes(report)
    assert note.startswith(
        "the statistics of 21 BatchNorm layers are corrected on 14 samples, which changes the dist"
    )
    assert f"on 2 held-out samples from {before:.4g} to {after:.4g}" in note


def test_a_correction_that_hurts_is_undone(monkeypatch):
    monkeypatch.setattr(
        batch_norm,
        "_moved",
        lambda running, dense, pruned: batch_norm._Moments(running.mean + 9, running.variance),
    )
    dense = resnet()
    _, corrected, report = both(dense, images(8), **MAGNITUDE)
    assert_same(statistics(corrected), statistics(dense))
    assert (
        "keep their statistics instead of a correction, which would change the distance"
        in notes(report)[0]
    )


def test_a_channel_that_pruning_silences_and_one_that_was_silent():
    """A zero variance before gives no ratio, and one afterward leaves none of the running statistics."""
    # Counts, sums and sums of squares.
    dense = torch.tensor([[5.0, 5.0], [10.0, 0.0], [20.0, 40.0]]).double()
    # Channel 0 awakes, channel 1 falls silent.
    pruned = torch.tensor([[5.0, 5.0], [15.0, 5.0], [85.0, 5.0]]).double()
    running = batch_norm._Moments(torch.ones(2).double(), torch.full((2,), 2.0).double())
    moved = batch_norm._moved(running, dense, pruned)
    close(moved.mean, torch.tensor([2.0, 1.0]).double())
    close(moved.variance, torch.tensor([12.0, 0.0]).double())


def test_a_layer_that_no_batch_reaches_and_one_without_statistics():
    dense = warmed(one_layer(nn.BatchNorm1d(8)))
    dense[1].unused = nn.BatchNorm1d(8)
    dense[1].free = nn.BatchNorm1d(8, track_running_stats=False)
    _, corrected, report = both(dense, vectors(3), **LINEAR)
    assert torch.equal(corrected[1].unused.running_mean, torch.zeros(8))
    assert notes(report)[0].startswith("the statistics of 1 BatchNorm layer are corrected")


@pytest.mark.parametrize(
    ("make", "batches", "choices", "said"),
    [
        (ZOO["vit"].build, Untouched, {}, []),
        (resnet, Untouched, {"keep_batch_norm": True}, []),
        (resnet, lambda: None, {}, ["no calibration batches were given"]),
        (resnet, list, {}, ["no calibration batch reached a BatchNorm layer"]),
    ],
)
def test_magnitude_reads_the_batches_only_for_it(make, batches, choices, said):
    found = notes(prune(make(), batches(), **MAGNITUDE, **choices))
    assert [text in note for text, note in zip(said, found, strict=True)] == [True] * len(said)


def test_outputs_that_are_no_predictions():
    model = resnet()
    report = prune(model, images(8), forward=lambda x: [model(x), None][1])
    assert (
        "corrected on 7 samples; no predictions of held-out samples to compare" in notes(report)[0]
    )
    assert any(changed(model, resnet()))


@pytest.mark.parametrize(
    ("last", "text"), [(5, "keep_batch_norm=True leaves"), (7, "calibration batch")]
)
def test_an_error_restores_the_statistics(last, text):
    """After 3 passes to try two samples, 2 dense batches, and 2 pruned ones."""
    dense = resnet()
    model = deepcopy(dense)
    calls = []

    def forward(x):
        calls.append(len(x))
        if len(calls) == last:
            raise KeyError("broken")
        return model(x)

    with pytest.raises(KeyError) as caught:
        prune(model, images(2, 3), **MAGNITUDE, forward=forward)
    assert text in caught.value.__notes__[-1]
    assert_same(statistics(model), statistics(dense))
    assert state_of(model) == state_of(dense)


def test_processes_add_their_sums(pair):
    batches = images(2, 3, 2)
    one, other = pair.run(prune_batch_norms, batches, shares=((0, 2), (1,)))
    assert_same(one, other)
    alone = resnet()
    prune(alone, batches, **MAGNITUDE, only=["layer4.*"])
    first = changed(alone, resnet()).index(True)
    # Later layers see inputs that the batches of one process have corrected.
    alone = [x.running_mean for x in batch_norm_layers(alone)]
    assert_close(one[first], alone[first])
    assert_close(one, alone, rtol=0.1, atol=0.02)


def test_distillation_starts_from_the_corrected_statistics_and_leaves_them():
    dense = resnet()
    batches = images(5, 5, 6)
    corrected = deepcopy(dense)
    distilled = deepcopy(dense).train()
    prune(corrected, batches, 0.5)
    report = prune(distilled, batches, 0.5, recovery=Distill(passes=1, blocks=False))
    assert_same(statistics(corrected), statistics(distilled))
    assert distilled.training
    assert not torch.equal(distilled.bn1.weight, corrected.bn1.weight)
    (before,) = distances(dense, [corrected], [torch.cat(batches)[index] for index in (7, 15)])
    assert report.training.passes[0].held_out == pytest.approx(before, rel=1e-5)
