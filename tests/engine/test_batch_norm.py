"""The correction of BatchNorm statistics, against a slow version that keeps all inputs of all layers."""

import copy
from functools import partial

import pytest
import torch
from support.detectors import retinanet, scenes
from support.families import _double
from support.pair_cases import prune_batch_norms
from support.zoo import ZOO, seeded
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torchvision.ops import FrozenBatchNorm2d

from wanda_lightning import Distil, PruningConfig, prune
from wanda_lightning.calibration.observer import PassiveCalibration
from wanda_lightning.engine import batch_norm
from wanda_lightning.engine.batch_norm import batch_norm_layers
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.engine.prune import prune_collected
from wanda_lightning.parallel import SINGLE_PROCESS


def statistics(model):
    """The running means and variances, in float64."""
    return [(x.running_mean.double(), x.running_var.double()) for x in batch_norm_layers(model)]


def same(model, other):
    pairs = zip(statistics(model), statistics(other), strict=True)
    return all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def close(model, expected, rtol=1e-5):
    for found, right in zip(statistics(model), expected, strict=True):
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)


def moments(inputs):
    """The mean and unbiased variance of each channel over some inputs, in float64."""
    rows = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    return rows.mean(1), rows.var(1)


def slow(dense, pruned, forwards):
    """Correct a copy of the pruned model, and return its statistics.

    Args:
        dense: The dense model.
        pruned: The pruned model with the statistics of the dense one.
        forwards: One function for each batch, which runs it through a model.
    """
    model, running = copy.deepcopy(pruned), statistics(dense)
    before = [[] for _ in running]
    after = [[] for _ in running]

    def keep(index):
        return lambda module, args: before[index].append(args[0])

    def correct(index, count):
        (mean, variance), (m, v) = running[index], moments(before[index][:count])
        new_m, new_v = moments(after[index][:count])
        s = torch.tensor([min(1.0, float(b / a)) for a, b in zip(v, new_v, strict=True)]).double()
        layer = batch_norm_layers(model)[index]
        layer.running_mean.copy_(new_m + s.sqrt() * (mean - m))
        layer.running_var.copy_(new_v + s * (variance - v))

    def keep_and_correct(index):
        def hook(module, args):
            after[index].append(args[0])
            correct(index, len(after[index]))

        return hook

    hooks = [x.register_forward_pre_hook(keep(i)) for i, x in enumerate(batch_norm_layers(dense))]
    hooks += [x.register_forward_pre_hook(keep_and_correct(i)) for i, x in enumerate(batch_norm_layers(model))]
    with torch.no_grad():
        for network in (dense, model):
            for forward in forwards:
                forward(network)
    for hook in hooks:
        hook.remove()
    return statistics(model)


def both(dense, batches, sparsity=0.5, **choices):
    """Prune without and with the correction."""
    without, corrected = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(without, batches, sparsity, keep_batch_norm=True, progress=False, **choices)
    report = prune(corrected, batches, sparsity, progress=False, **choices)
    return without, corrected, report


def resnet(name="resnet18"):
    """A specimen in float64, in which rounding does not grow from layer to layer."""
    return ZOO[name].build().double()


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 32, 32, generator=generator).double() for size in sizes]


def notes(report):
    return [note for note in report.notes if "BatchNorm" in note]


@pytest.mark.parametrize(
    ("name", "choices", "at_once"),
    [
        ("resnet18", {"method": "magnitude"}, batch_norm._AT_ONCE),
        ("resnet18", {"method": "wanda"}, 1),
        ("resnet18", {"method": "wanda", "sequential": "layer"}, batch_norm._AT_ONCE),
        ("resnet50", {"method": "wanda", "sequential": "none"}, 5000),
    ],
)
def test_it_equals_the_slow_version(name, choices, at_once, monkeypatch):
    monkeypatch.setattr(batch_norm, "_AT_ONCE", at_once)
    dense, batches = resnet(name), images(2, 3)
    without, corrected, report = both(dense, batches, **choices)
    for a, b in zip(without.parameters(), corrected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert same(without, dense)
    close(corrected, slow(dense, without, [lambda model, x=x: model(x) for x in batches]))
    assert notes(report) == [
        f"the statistics of {len(statistics(dense))} BatchNorm layers are corrected on 5 samples; no predictions of "
        "held-out samples to compare"
    ]
    assert not any(module._forward_pre_hooks for module in corrected.modules())
    assert all(a.training == b.training for a, b in zip(dense.modules(), corrected.modules(), strict=True))


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_it_equals_the_slow_version_in_a_detector(norm_layer):
    """Its batches are lists of images of different sizes, and its layers are frozen if its weights were trained."""
    dense = seeded(partial(retinanet, norm_layer)).double()
    batches = tree_map_only(torch.Tensor, _double, scenes(2, 3))
    for layer in batch_norm_layers(dense):
        layer.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    without, corrected, report = both(dense, batches, method="magnitude")
    assert same(without, dense)
    assert not same(corrected, dense)
    close(corrected, slow(dense, without, [lambda model, x=x: model(x[0]) for x in batches]))
    assert notes(report)[0].startswith(f"the statistics of {len(statistics(dense))} BatchNorm layers are corrected")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_where_nothing_is_pruned(dtype):
    dense = resnet().to(dtype)
    batches = [x.to(dtype) for x in images(4, 5)]
    unpruned = copy.deepcopy(dense)
    prune(unpruned, batches, 0.0, progress=False)
    assert same(unpruned, dense)
    _, corrected, _ = both(dense, batches, method="magnitude", only=["layer3.*", "layer4.*"])
    changed = [
        not torch.equal(a.running_mean, b.running_mean)
        for a, b in zip(batch_norm_layers(dense), batch_norm_layers(corrected), strict=True)
    ]
    first = changed.index(True)
    assert [x for x, _ in dense.named_modules() if "bn" in x or "downsample.1" in x][first] == "layer3.0.bn1"


def test_every_eighth_sample_is_held_out():
    dense, batches = resnet(), images(4, 4, 8)
    without, corrected, report = both(dense, batches, 0.7, method="magnitude")
    parts = [batches[0], batches[1][:3], batches[2][:7]]
    expected = slow(dense, without, [lambda model, x=x: model(x) for x in parts])
    close(corrected, expected)
    held_out = torch.stack([batches[1][3], batches[2][7]])
    with torch.no_grad():
        p, *qs = (model(held_out).log_softmax(1) for model in (dense, without, corrected))
    before, after = (float(F.kl_div(q, p, reduction="batchmean", log_target=True)) for q in qs)
    assert after < before
    (note,) = notes(report)
    assert note.startswith("the statistics of 21 BatchNorm layers are corrected on 14 samples, which changes the dist")
    assert f"on 2 held-out samples from {before:.4g} to {after:.4g}" in note


def test_a_correction_that_hurts_is_undone(monkeypatch):
    monkeypatch.setattr(batch_norm, "_moved", lambda running, dense, pruned: (running[0] + 9, running[1]))
    dense = resnet()
    _, corrected, report = both(dense, images(8), method="magnitude")
    assert same(corrected, dense)
    assert "keep their statistics instead of a correction, which would change the distance" in notes(report)[0]


class OneLayer(nn.Module):
    """A pruned matrix, whose output a BatchNorm layer normalizes."""

    def __init__(self, norm, dims=0):
        super().__init__()
        self.linear, self.norm, self.dims = nn.Linear(6, 8), norm, dims
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.linear(x)  # (samples, places, channels)
        if self.dims == 0:
            return self.head(self.norm(x.flatten(0, 1)))
        x = self.norm(x.transpose(1, 2).reshape(len(x), 8, -1, *[1] * (self.dims - 1)))
        return self.head(x.flatten(2).mean(2))


def warmed(model):
    """Set the running statistics to values that a training could give."""
    torch.manual_seed(3)
    for layer in batch_norm_layers(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


def vectors(*sizes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 5, 6, generator=generator).double() + 0.5 for size in sizes]


class Twice(nn.Module):
    """A model that calls one block, with its BatchNorm layer, twice."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.block(x.flatten(0, 1))))


@pytest.mark.parametrize(
    ("model", "dtype", "sequential"),
    [
        (OneLayer(nn.BatchNorm1d(8)), torch.float64, "block"),
        (OneLayer(nn.BatchNorm1d(8)), torch.bfloat16, "block"),
        (OneLayer(nn.BatchNorm1d(8, momentum=None), 1), torch.float64, "block"),
        (OneLayer(nn.BatchNorm2d(8, affine=False), 2), torch.float64, "block"),
        (OneLayer(nn.BatchNorm3d(8), 3), torch.float64, "block"),
        (OneLayer(nn.SyncBatchNorm(8), 2), torch.float64, "block"),
        (OneLayer(BatchNormAct2d(8), 2), torch.float64, "block"),
        (Twice(), torch.float64, "none"),
    ],
)
def test_kinds_of_layers(model, dtype, sequential):
    dense, batches = warmed(copy.deepcopy(model)).to(dtype), [x.to(dtype) for x in vectors(3, 4)]
    only = ["block.0" if isinstance(model, Twice) else "linear"]
    without, corrected, _ = both(dense, batches, only=only, sequential=sequential)
    assert not same(corrected, dense)
    expected = slow(dense, without, [lambda model, x=x: model(x) for x in batches])
    close(corrected, expected, rtol=1e-5 if dtype == torch.float64 else 2**-7)


def test_a_channel_that_pruning_silences_and_one_that_was_silent():
    """A zero variance before gives no ratio, and one afterward leaves none of the running statistics."""
    sums = [torch.tensor([[5.0, 5.0], [10.0, 0.0], [20.0, 40.0]]).double() for _ in range(2)]
    sums[1][1:] = torch.tensor([[15.0, 5.0], [85.0, 5.0]])  # channel 0 awakes, channel 1 falls silent
    running = (torch.tensor([1.0, 1.0]).double(), torch.tensor([2.0, 2.0]).double())
    mean, variance = batch_norm._moved(running, *sums)
    torch.testing.assert_close(mean, torch.tensor([2.0, 1.0]).double())
    torch.testing.assert_close(variance, torch.tensor([12.0, 0.0]).double())


def test_a_layer_that_no_batch_reaches_and_one_without_statistics():
    dense = warmed(OneLayer(nn.BatchNorm1d(8)))
    dense.unused, dense.free = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)
    _, corrected, report = both(dense, vectors(3), only=["linear"])
    assert torch.equal(corrected.unused.running_mean, torch.zeros(8))
    assert notes(report)[0].startswith("the statistics of 1 BatchNorm layer are corrected")
    dense.norm = nn.Identity()
    _, _, report = both(dense, vectors(3), only=["linear"])
    assert notes(report) == [
        "no calibration batch reached a BatchNorm layer: they keep the statistics of the dense model"
    ]


def test_a_model_without_such_layers_reads_no_batches_for_it():
    def unread():
        raise AssertionError
        yield

    report = prune(ZOO["vit"].build(), unread(), method="magnitude", progress=False)
    assert not notes(report)
    assert "normalize" not in report.seconds
    report = prune(resnet(), unread(), method="magnitude", keep_batch_norm=True, progress=False)
    assert not notes(report)


def test_magnitude_reads_the_batches_only_for_it():
    report = prune(resnet(), method="magnitude", progress=False)
    assert notes(report) == [
        "BatchNorm layers keep the statistics of the dense model, which do not fit the pruned one: no calibration "
        "batches were given"
    ]
    with pytest.raises(TypeError) as caught:
        prune(resnet(), [{"x": None}], method="magnitude", progress=False, forward=lambda batch: 1 + "")
    assert "keep_batch_norm=True leaves their statistics alone" in caught.value.__notes__[-1]
    report = prune(resnet(), [], method="magnitude", progress=False)
    assert "no calibration batch reached" in notes(report)[0]


def test_an_empty_batch_changes_nothing():
    plain, model, (first, second) = resnet(), resnet(), images(2, 3)
    prune(plain, [first, second], progress=False)
    prune(model, [first, first[:0], second], progress=False)
    assert same(plain, model)


def test_outputs_that_are_no_predictions():
    dense = resnet()
    corrected = copy.deepcopy(dense)
    report = prune(corrected, images(8), forward=lambda x: [corrected(x), None][1], progress=False)
    assert "corrected on 7 samples; no predictions of held-out samples to compare" in notes(report)[0]
    assert not same(corrected, dense)


def test_an_error_restores_the_statistics():
    dense = resnet()
    model, calls = copy.deepcopy(dense), []

    def forward(x):
        calls.append(len(x))
        if len(calls) == 7:  # 3 to try two samples, 2 dense batches, 2 pruned ones
            raise KeyError("broken")
        return model(x)

    with pytest.raises(KeyError) as caught:
        prune(model, images(2, 3), method="magnitude", forward=forward, progress=False)
    assert "Its BatchNorm layers have the statistics of the dense model." in caught.value.__notes__[-1]
    assert same(model, dense)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_validation_loop_does_not_correct():
    model = resnet()
    before = statistics(model)
    plan = make_plan(PruningConfig.from_names(sequential="none"), model)
    passive = PassiveCalibration(model, plan.whole_model, plan.observed, SINGLE_PROCESS)
    for batch in images(2):
        with passive.collect(batch):
            model(batch)
    report = prune_collected(plan, passive)
    close(model, before)
    assert "the batches of a validation loop run only once" in notes(report)[0]


def test_processes_add_their_sums(pair):
    batches = images(2, 3, 2)
    one, other = pair.run(prune_batch_norms, batches, shares=((0, 2), (1,)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    alone = resnet()
    prune(alone, batches, method="magnitude", only=["layer4.*"], progress=False)
    alone = [x.running_mean for x in batch_norm_layers(alone)]
    changed = [not torch.equal(a, x.running_mean) for a, x in zip(one, batch_norm_layers(resnet()), strict=True)]
    first = changed.index(True)  # later layers see inputs that the batches of one process have corrected
    torch.testing.assert_close(one[first], alone[first])
    for a, b in zip(one, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


def test_distillation_starts_from_the_corrected_statistics_and_leaves_them():
    dense, batches = resnet(), images(5, 5, 6)
    corrected, distilled = copy.deepcopy(dense), copy.deepcopy(dense).train()
    prune(corrected, batches, 0.5, progress=False)
    report = prune(distilled, batches, 0.5, recovery=Distil(passes=1, blocks=False), progress=False)
    assert same(corrected, distilled)
    assert distilled.training
    assert not torch.equal(distilled.bn1.weight, corrected.bn1.weight)
    held_out = [torch.cat(batches)[index] for index in (7, 15)]
    with torch.no_grad():
        p, q = (model.eval()(torch.stack(held_out)).log_softmax(-1) for model in (dense, corrected))
    before = F.kl_div(q, p, reduction="batchmean", log_target=True)
    assert report.training.passes[0].held_out == pytest.approx(float(before), rel=1e-5)
