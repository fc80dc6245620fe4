"""Learned masks equal plain automatic differentiation of masked weights."""

import copy

import pytest
import torch
from support.callbacks import Net, loader
from torch.func import functional_call
from torch.nn import functional as F

from wanda_lightning import prune
from wanda_lightning.core.relaxation import Gates, PatternChoice
from wanda_lightning.learned_masks import LearnedLayer, LearnedMasks, MaskLearning
from wanda_lightning.zeros import prunable_layers

STEPS = 4


def pruned(pattern):
    torch.manual_seed(0)
    dense = Net()
    module = Net()
    module.load_state_dict(dense.state_dict())
    prune(module, [batch[0] for batch in loader(24)], 0.5, pattern=pattern, progress=False)
    return module, dict(dense.state_dict())


def learned(module, dense, choices, pattern):
    groups = []
    for layer in prunable_layers(module):
        keep = layer.read() != 0
        relaxation = PatternChoice(2, 4) if pattern == "2:4" else Gates(int(keep.sum()))
        groups.append((relaxation, [LearnedLayer.begin(layer, keep, dense[f"{layer.name}.weight"], choices.prior)]))
    return LearnedMasks(choices, groups)


def batches():
    return [batch for _ in range(STEPS) for batch in loader(24)][:STEPS]


def train(module, masks, optimizer):
    for step, batch in enumerate(batches()):
        masks.apply(step, step / (STEPS - 1))
        module._loss(batch).backward()
        masks.learn(step, step / (STEPS - 1), STEPS)
        optimizer.step()
        optimizer.zero_grad()
        masks.settle()


class ByHand:
    """Masks as factors in the forward pass, with gradients by autograd."""

    def __init__(self, module, dense, choices, pattern):
        self.module, self.choices, self.pattern = module, choices, pattern
        self.values, self.scores, self.mean, self.square = {}, {}, {}, {}
        for name, weight in module.state_dict().items():
            if weight.ndim == 2:
                keep = weight != 0
                value = torch.where(keep, weight, dense[name])
                size = weight[keep].square().mean().sqrt()
                self.scores[name] = (torch.tanh(value.abs() / size) + choices.prior * keep).float()
                self.mean[name] = self.square[name] = torch.zeros_like(value, dtype=torch.bfloat16)
                weight = value
            self.values[name] = weight.clone()

    def hard(self, scores):
        if self.pattern == "2:4":
            groups = scores.view(-1, 4)
            return torch.zeros_like(groups).scatter(1, groups.topk(2, dim=1).indices, 1.0).view_as(scores)
        order = scores.flatten().sort(stable=True).indices  # equal scores: the later ones survive
        return torch.zeros(scores.numel()).index_fill(0, order[scores.numel() // 2 :], 1.0).view_as(scores)

    def relaxation(self, scores):
        if self.pattern == "2:4":
            return PatternChoice(2, 4), torch.tensor(0.0)
        ordered = scores.detach().flatten().sort().values
        half = scores.numel() // 2
        return Gates(half), (ordered[half - 1] + ordered[half]) / 2

    def train(self):
        first, last = self.choices.temperature
        for step, (x, labels) in enumerate(batches()):
            progress = step / (STEPS - 1)
            temperature = first * (last / first) ** progress
            values = {name: value.clone().requires_grad_() for name, value in self.values.items()}
            leaves, weights = {}, dict(values)
            for name, scores in self.scores.items():
                leaf = leaves[name] = scores.float().requires_grad_()
                relaxation, boundary = self.relaxation(leaf)
                mask = relaxation.relax(leaf, boundary, temperature)
                if self.choices.straight_through:
                    mask = self.hard(leaf.detach()) + mask - mask.detach()
                weights[name] = values[name] * mask
            F.cross_entropy(functional_call(self.module, weights, (x,)), labels).backward()
            for name, leaf in leaves.items():
                mean = self.mean[name].float() * 0.95 + leaf.grad * 0.05
                square = self.square[name].float() * 0.95 + leaf.grad**2 * 0.05
                self.mean[name], self.square[name] = mean.bfloat16(), square.bfloat16()
                rate = 2 * self.choices.travel / STEPS * (1 - progress)
                self.scores[name] = leaf.detach() - rate * mean / square.sqrt().clamp(min=1e-18)
            if self.choices.train_weights:
                for name, value in values.items():
                    self.values[name] = (value - 0.1 * value.grad).detach()


@pytest.mark.parametrize("pattern", ["unstructured_layer", "2:4"])
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("train_weights", [True, False])
def test_it_equals_autograd(pattern, straight_through, train_weights):
    module, dense = pruned(pattern)
    choices = MaskLearning(3.0, 1.2, straight_through=straight_through, train_weights=train_weights)
    slow = ByHand(module, dense, choices, pattern)
    masks = learned(module, dense, choices, pattern)
    rate = 0.1 if train_weights else 0.0
    train(module, masks, torch.optim.SGD(module.parameters(), lr=rate))
    slow.module = Net()
    slow.train()
    for layer in masks.layers:
        name = f"{layer.layer.name}.weight"
        close = torch.isclose(layer.scores.float(), slow.scores[name].float(), atol=0.02)
        assert close.float().mean() > 0.99  # a slope near 0 may have another sign
        assert torch.allclose(layer.values, slow.values[name], atol=1e-3)
        moved = (layer.layer.weight == 0) != (slow.hard(slow.scores[name].float()) == 0)
        assert moved.float().mean() < 0.01
    assert max(masks.moved().values()) > 0.01


def test_it_starts_from_the_pruned_model():
    module, dense = pruned("unstructured")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    masks = learned(module, dense, MaskLearning(prior=1.1), "unstructured")
    masks.apply(0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert set(masks.moved().values()) == {0.0}
    for layer in masks.layers:
        name = f"{layer.layer.name}.weight"
        assert torch.equal(layer.values, torch.where(before[name] != 0, before[name], dense[name]))


def test_the_noise_of_a_step_is_the_same_whenever_it_is_drawn():
    module, dense = pruned("2:4")
    masks = learned(module, dense, MaskLearning(noise=(3.0, 1.0), straight_through=True), "2:4")
    found = []
    for step in (5, 6, 5):
        torch.rand(3)
        masks.apply(step, 0.5)
        found.append(torch.cat([layer.layer.weight.flatten() for layer in masks.layers]))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert ((found[1].view(-1, 4) == 0).sum(dim=1) == 2).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_no_score(bad):
    module, dense = pruned("unstructured")
    masks = learned(module, dense, MaskLearning(), "unstructured")
    before = [layer.scores.clone() for layer in masks.layers]
    masks.apply(0, 0.0)
    module._loss(batches()[0]).backward()
    next(iter(module.parameters())).grad[0, 0] = bad
    masks.learn(0, 0.0, STEPS)
    assert all(torch.equal(layer.scores, old) for layer, old in zip(masks.layers, before, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"travel": 0}, "travel of MaskLearning must be a number above 0"),
        ({"prior": 1}, "prior of MaskLearning must be a number above 1"),
        ({"temperature": (1.0, 0.0)}, "temperature must be two values.*above 0, but it is"),
        ({"noise": 1.0}, "noise must be two values, for the first and the last step"),
        ({"seed": -1}, "seed of MaskLearning must be a whole number of at least 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MaskLearning(**wrong)


@pytest.mark.parametrize("steps", [10, 10_000])
def test_scores_travel_as_far_as_they_should(steps):
    module, dense = pruned("unstructured")
    (_, (layer,)), *_ = learned(module, dense, MaskLearning(), "unstructured")._groups
    before = layer.scores.clone()
    for step in range(steps):
        layer.descend(torch.full_like(layer.scores, 1e-9), 2 * 2.0 / steps * (1 - step / (steps - 1)))
    assert (before - layer.scores).min().item() == pytest.approx(2.0, rel=0.05 if steps > 10 else 0.7)


class Images(torch.nn.Module):
    """Convolutions: whole, grouped, and with a kernel."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 1)
        self.wide = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.grouped(self.wide(self.stem(x)).relu()).relu().mean(dim=(2, 3)))


def test_gradients_of_convolutions_are_masked():
    torch.manual_seed(0)
    dense, images = Images(), torch.randn(8, 3, 6, 6)
    module = copy.deepcopy(dense)
    prune(module, [images], 0.5, include_grouped=True, progress=False)
    values = {layer.name: layer.read() for layer in prunable_layers(dense)}
    groups = []
    for layer in prunable_layers(module):
        keep = layer.read() != 0
        if not keep.all():
            groups.append((Gates(int(keep.sum())), [LearnedLayer.begin(layer, keep, values[layer.name], 2.0)]))
    assert len(groups) >= 4  # the grouped one has two
    masks = LearnedMasks(MaskLearning(), groups)
    masks.apply(0, 0.0)
    module(images).square().mean().backward()
    plain = {layer.layer.name: layer.gradient().clone() for layer in masks.layers}
    masks.learn(0, 0.0, 10)
    for layer in masks.layers:
        gradient = layer.layer.kind.read(layer.layer.part(layer.layer.parameter.grad))
        assert torch.equal(gradient, plain[layer.layer.name] * layer.keep), layer.layer.name
        assert torch.equal(layer.layer.read(), layer.values)
