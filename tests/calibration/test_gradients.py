"""The Fisher information that an allocation reads, against autograd by hand."""

import copy
from functools import partial
from itertools import cycle, product

import pytest
import torch
from support.batches import split
from support.chains import overrides
from support.gradients import gradients
from support.pairwise import spread, with_nightly
from support.refusals import refusal
from support.zoo import ZOO, run
from torch import nn
from torch.nn import functional as F

from wanda_lightning import Fisher, PruningCallback, Uniform, WandaPrune, prune
from wanda_lightning.calibration.batches import map_tensors
from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.parallel import SINGLE_PROCESS


def measured(model, batches, samples=None, predictions=0):
    return {name: sums.inputs for name, sums in gradients(model, batches, samples, predictions).items()}


def drawn(logits, first):
    """The labels that are drawn from the predictions of a batch, which begins with sample number `first`."""
    generators = [torch.Generator().manual_seed(first + index) for index in range(len(logits))]
    rows = logits.detach().softmax(-1).split(1)
    return torch.cat([torch.multinomial(p, 1, generator=g)[:, 0] for p, g in zip(rows, generators, strict=True)])


def test_the_sums_are_those_of_autograd():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 7), nn.Linear(7, 4)
    model = nn.Sequential(first, nn.ReLU(inplace=True), second)
    batches = [torch.randn(3, 5), torch.randn(6, 5)]
    expected = {"0": torch.zeros(5), "2": torch.zeros(7)}
    rows = {"0": torch.zeros(7), "2": torch.zeros(4)}
    for number, x in ((0, batches[0]), (3, batches[1])):
        inner = first(x)
        hidden = inner.relu()
        logits = second(hidden)
        loss = F.cross_entropy(logits, drawn(logits, number), reduction="sum")
        for name, seen, output in (("0", x, inner), ("2", hidden, logits)):
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            for token in range(len(x)):  # each alone
                expected[name] += seen[token].detach() ** 2 * gradient[token].square().mean()
                rows[name] += gradient[token] ** 2
    got = gradients(nn.Sequential(model, nn.Identity())[0], batches)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].inputs, value)
        torch.testing.assert_close(got[name].rows, rows[name])
        torch.testing.assert_close(got[name].row_weights(), rows[name] / rows[name].mean())


SAMPLED = (
    *("llama_padded", "gpt_oss", "t5", "vit", "convnext", "block_twice", "routed", "expert_list"),
    *("keywords_only", "autocast_inside", "inplace"),
)


@pytest.mark.parametrize("name", with_nightly(SAMPLED, ZOO))
def test_recomputed_blocks_give_the_same_sums(name):
    model = ZOO[name].build().double()
    batches = map_tensors(lambda x: x.double() if x.is_floating_point() else x, ZOO[name].batches())
    recomputed, stored = (gradients(model, batches, recomputed=choice) for choice in (True, False))
    torch.testing.assert_close(recomputed, stored, rtol=1e-4, atol=1e-12)
    assert any(sums.rows.any() for sums in stored.values())


# In memory, images, which have one prediction each, run as one batch; and a block that is called twice adds its calls
# in another order.
ROUNDED = {"block_twice", "convnext", "convnext_conv_mlp", "deit", "resnet18", "resnet50", "swin", "vit"}


def by_block(model, batches, hold):
    """The sums of samples that pass side by side."""
    plan = make_plan(PruningConfig.from_names(allocation="fisher"), model)
    data = Samples(model, batches, partial(run, model), None, SINGLE_PROCESS, "the test")
    with pruning_mode(model):
        return gradient_statistics(model, plan.layers, plan.block_units, data, hold=hold)


@pytest.mark.parametrize(
    ("name", "at_once"),
    with_nightly(zip(SAMPLED[:-1], cycle([1, 8])), product(sorted(ZOO.keys() - {"inplace"}), [1, 8])),
)
def test_samples_side_by_side_give_the_same_sums(name, at_once, monkeypatch):
    monkeypatch.setattr("wanda_lightning.calibration.gradients.SAMPLES_AT_ONCE", at_once)
    monkeypatch.setattr("wanda_lightning.calibration.gradients.PREDICTIONS_AT_ONCE", at_once)
    model, batches, held = ZOO[name].build(), ZOO[name].batches(), []
    expected = gradients(model, batches)
    random = torch.get_rng_state()
    found = by_block(model, batches, held.append)
    assert torch.equal(torch.get_rng_state(), random)
    rtol, atol = (1e-3, 1e-8) if name in ROUNDED else (0, 0)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    assert not overrides(model)


def test_blocks_that_cannot_run_twice_are_refused_side_by_side():
    model, batches = ZOO["inplace"].build(), ZOO["inplace"].batches()
    with pytest.raises(ValueError, match=r"blocks\.0 cannot run twice from disk"):
        by_block(model, batches, lambda name: None)
    assert not overrides(model)


class Transpose(nn.Module):
    def forward(self, x):
        return x.mT


def test_the_classes_of_a_segmentation_are_in_dimension_1():
    """The same model as one that has them in the last dimension, of three."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1)
    images = [torch.randn(2, 3, 4, 6), torch.randn(1, 3, 4, 6)]
    got = gradients(nn.Sequential(*layers), images)
    expected = gradients(nn.Sequential(*layers, nn.Flatten(2), Transpose()), images)
    assert set(got) == {"1", "2"}
    torch.testing.assert_close(got, {name: expected[name] for name in got})


def test_a_convolution_has_a_gradient_at_each_position():
    torch.manual_seed(0)
    stem, conv, head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, stride=2), nn.Linear(6, 5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = stem, conv, head

        def forward(self, x):
            return self.head(self.conv(self.stem(x)).relu().mean((2, 3)))

    x = torch.randn(2, 3, 7, 7)
    seen = stem(x).detach()
    output = conv(seen)
    logits = head(output.relu().mean((2, 3)))
    loss = F.cross_entropy(logits, drawn(logits, 0), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, output)
    expected = torch.zeros(4, 3, 3)
    for image in range(2):
        for row in range(3):
            for column in range(3):
                patch = seen[image, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                expected += patch**2 * gradient[image, :, row, column].square().mean()
    channels_inside = expected.permute(1, 2, 0).flatten()
    torch.testing.assert_close(measured(Net(), [x])["conv"], channels_inside, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["llama_padded", "llama_left_padded"])
def test_padding_does_not_count(name):
    specimen = ZOO[name]
    model = specimen.build()
    batch = next(batch for batch in specimen.batches() if not batch["attention_mask"].all())
    mask = batch["attention_mask"].bool()
    other = dict(batch, input_ids=torch.where(mask, batch["input_ids"], 7))
    torch.testing.assert_close(measured(model, [batch]), measured(model, [other]))


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_nothing_of_it_stays_in_the_model(sequential):
    model = ZOO["vit"].build()
    frozen = next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    prune(model, ZOO["vit"].batches(), 0.0, allocation="fisher", sequential=sequential, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "sequential"), spread(["llama", "vit", "convnext_conv_mlp", "t5"], ["layer", "none"]))
def test_every_granularity_gives_the_same_sparsities(name, sequential):
    specimen = ZOO[name]
    reports = [
        prune(specimen.build(), specimen.batches(), 0.5, allocation="fisher", sequential=g, progress=False)
        for g in (sequential, "block")
    ]
    sparsities, others = ([layer.target for layer in report.layers] for report in reports)
    assert sparsities == others
    assert max(sparsities) - min(sparsities) > 0.05
    assert all(0.3 <= sparsity <= 0.7 for sparsity in sparsities)  # 0.15 from 0.5, and a step of a narrow row
    assert reports[0].sparsity == pytest.approx(0.5, abs=0.01)


def test_only_the_first_samples_go_backward():
    model, batches = ZOO["llama"].build, ZOO["llama"].batches()
    size = len(batches[0]["input_ids"])
    some = prune(model(), batches, 0.5, allocation=Fisher(num_samples=size), progress=False)
    one = prune(model(), batches[:1], 0.5, allocation="fisher", progress=False)
    every = prune(model(), batches, 0.5, allocation="fisher", progress=False)
    targets = [[layer.target for layer in report.layers] for report in (some, one, every)]
    assert targets[0] == targets[1] != targets[2]
    assert some.config["allocation"]["num_samples"] == size


@pytest.mark.parametrize(("name", "samples"), spread(["llama", "llama_padded", "mixtral"], [3, None, 6, 1]))
def test_the_size_of_the_batches_does_not_matter(name, samples):
    """Also where the limit lies inside a batch; a draw depends on the sample alone."""
    batches = split(ZOO[name].batches(), 8)
    sums = [measured(ZOO[name].build().double(), split(batches, size), samples=samples) for size in (1, 2, 4, 8)]
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 8), (9,), (4, 5), (3, 3, 3)], ids=str)
def test_samples_with_one_prediction_share_a_pass_and_fill_up_to_the_minimum(sizes):
    model, images = ZOO["vit"].build(), torch.cat([batch for batch, _ in ZOO["vit"].batches()] * 2)[:9]
    alone, runs = measured(model, [images[:1]]), []
    trained = torch.is_grad_enabled  # the trial of two samples has no gradients
    handle = model.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])) if trained() else None)
    batches = list(images.split(sizes))
    torch.testing.assert_close(measured(model, batches, samples=1), alone, rtol=1e-4, atol=1e-7)
    runs.clear()
    some, six = measured(model, batches, samples=2, predictions=6), measured(model, batches, samples=6)
    every = measured(model, batches, samples=2, predictions=100)
    assert sum(runs) == 6 + 6 + 9
    assert runs[0] == 1
    handle.remove()
    torch.testing.assert_close(every, measured(model, [images]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(some, six, rtol=1e-4, atol=1e-7)


class TimeFirst(nn.Module):
    """Its inputs are (time, samples, features); `hidden` gives the time steps that each step does not see."""

    def __init__(self, hidden):
        super().__init__()
        self.attention, self.up, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 12), nn.Linear(12, 5)
        self.hidden, self.lengths = hidden, []

    def enter(self, x):
        mask = self.hidden(torch.ones(len(x), len(x), dtype=torch.bool))
        return x + self.attention(x, x, x, attn_mask=mask)[0]

    def forward(self, x):
        self.lengths.append(len(x))
        return self.head(self.up(self.enter(x)).relu())


HIDDEN = {"none": torch.logical_not, "later": lambda every: every.triu(1), "earlier": lambda every: every.tril(-1)}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_time_steps_are_no_samples(hidden, caplog):
    torch.manual_seed(0)
    model, batches = TimeFirst(hidden), [torch.randn(7, 3, 8), torch.randn(6, 3, 8)]
    found, expected = measured(model, batches)["up"], 0
    assert caplog.text.count("each batch runs whole") == 1
    assert model.lengths[-2:] == [7, 6]
    for number, x in enumerate(batches):
        seen = model.enter(x).detach().flatten(0, 1)
        output = model.up(seen)
        logits = model.head(output.relu())
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(number))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels[:, 0], reduction="sum"), output)
        expected = expected + (seen.square() * gradient.square().mean(1, keepdim=True)).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_magnitude_may_be_spread_by_it():
    batches = ZOO["llama"].batches()
    report = prune(ZOO["llama"].build(), batches, 0.5, criterion="magnitude", allocation="fisher", progress=False)
    assert len({layer.target for layer in report.layers}) > 1
    with pytest.raises(ValueError, match="since allocation='fisher' reads calibration data, but none were given"):
        prune(ZOO["llama"].build(), None, 0.5, criterion="magnitude", allocation="fisher", progress=False)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model, x: None, "without logits of two or more classes that depend"),
        (lambda model, x: model(x).sum(), "without logits of two or more classes that depend"),
        (lambda model, x: model(x).detach(), "without logits of two or more classes that depend"),
        (lambda model, x: model(x) * torch.inf, "finite predictions, but those of batch 0 (counted from 0) hold NaN"),
    ],
)
def test_without_predictions_it_is_refused(forward, message):
    model = ZOO["plain_mlp"].build()
    found = refusal(model, ZOO["plain_mlp"].batches(), allocation="fisher", forward=partial(forward, model))
    assert message in found


def test_an_input_that_is_changed_after_the_layer_counts_as_it_was():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.up, self.head, self.in_place = nn.Linear(6, 6), nn.Linear(6, 3), in_place

        def forward(self, x):
            x = x.clone()
            h = self.up(x)
            x = x.add_(h) if self.in_place else x + h
            return self.head(x)

    model = Residual(in_place=True)
    other = Residual(in_place=False)
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(measured(model, [x]), measured(other, [x]))


def test_a_validation_loop_has_no_gradients():
    with pytest.raises(ValueError, match=r"calibrate_on='validation' .* needs backward passes"):
        WandaPrune(allocation=Fisher(), sequential="none", calibrate_on="validation")
    assert isinstance(PruningCallback(method="magnitude").config.allocation, Uniform)
    assert PruningCallback(allocation="fisher").config.data_reader is not None
