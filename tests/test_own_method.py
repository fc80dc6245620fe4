"""A criterion, pattern, solver or allocation outside of the package, made of public names only."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.layers import rng
from support.mlps import relu_mlp
from support.quiet import prune
from support.refusals import refuses
from user_of_types import Power

from wanda_lightning import PruningConfig
from wanda_lightning.core import Allocation, Criterion, Pattern, Solver, match_target
from wanda_lightning.core.statistics import SUMS


@dataclass(frozen=True)
class Columns(Pattern):
    """Zeros fill whole columns."""

    def __call__(self, scores, sparsity):
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[:, scores.sum(dim=0).argsort()[: int(scores.shape[1] * sparsity)]] = False
        return keep


@dataclass(frozen=True)
class Half(Solver):
    """Half of each kept weight, to tell it from the dense one."""

    def __call__(self, weight, inputs, selection):
        keep = selection.keep(weight, inputs)
        return weight / 2 * keep, keep


@dataclass(frozen=True)
class Slope(Allocation):
    slope: float = 0.2

    def __call__(self, layers, sparsity):
        wanted = {layer.name: self.slope * place for place, layer in enumerate(layers)}
        return match_target(layers, wanted, sparsity)


@pytest.fixture
def model():
    return relu_mlp(16, 12, 16)


@pytest.fixture
def weight(model):
    """A copy of the first weight before pruning."""
    return model[0].weight.detach().clone()


@pytest.fixture
def batch():
    return torch.randn(50, 16, generator=rng(1)) * torch.linspace(0.1, 3, 16)


def without_smallest(weight, scores):
    """The weight without the smaller half of the scores of each row, by a loop."""
    weight = weight.clone()
    for row, of_row in zip(weight, scores, strict=True):
        row[of_row.argsort()[: len(row) // 2]] = 0
    return weight


def test_a_criterion(model, weight, batch):
    report = prune(model, [batch], criterion=Power(0.3))
    scores = weight.abs() * batch.square().sum(dim=0).sqrt() ** 0.3
    assert torch.equal(model[0].weight, without_smallest(weight, scores))
    assert json.loads(report.to_json())["config"]["criterion"] == {"name": "Power", "power": 0.3}


def test_a_pattern(model, weight, batch):
    prune(model, [batch], criterion="magnitude", pattern=Columns())
    smallest = weight.abs().sum(dim=0).argsort()[:8]
    empty = (model[0].weight == 0).all(dim=0).nonzero().flatten()
    assert sorted(smallest.tolist()) == empty.tolist()


def test_a_solver(model, weight, batch):
    prune(model, [batch], solver=Half())
    scores = weight.abs() * batch.norm(dim=0)
    assert torch.equal(model[0].weight, without_smallest(weight, scores) / 2)


def test_an_allocation(model, batch):
    report = prune(model, [batch], allocation=Slope())
    assert report.layers[1].target - report.layers[0].target == pytest.approx(0.2, abs=1 / 12)
    assert report.sparsity == pytest.approx(0.5, abs=1 / 12)


def test_a_criterion_that_needs_nothing_needs_no_data(model, weight):
    @dataclass(frozen=True)
    class Weight(Criterion):
        def __call__(self, weight, inputs):
            return weight.float()

    prune(model, criterion=Weight())
    assert torch.equal(model[0].weight, without_smallest(weight, weight))


# ---- mistakes that would be silent, or end in an error of another library


@dataclass(frozen=True)
class WrongCriterion(Criterion):
    score: Callable

    def __call__(self, weight, inputs):
        return self.score(weight)


@dataclass(frozen=True)
class WrongPattern(Pattern):
    choose: Callable

    def __call__(self, scores, sparsity):
        return self.choose(scores > scores.median())

    def keep_block(self, scores, sparsity, block):
        return (scores > 1).byte()


@dataclass(frozen=True)
class WrongSolver(Solver):
    solve: Callable

    def __call__(self, weight, inputs, selection):
        return self.solve(weight, selection.keep(weight, inputs))


@dataclass(frozen=True)
class WrongAllocation(Allocation):
    def __call__(self, layers, sparsity):
        return {layers[0].name: sparsity}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {
                "criterion": WrongCriterion(
                    lambda weight: torch.where(weight < 0, torch.nan, weight.abs())
                )
            },
            r"criterion=Wrong.* must return a score for each weight, .* [1-9]\d* NaN",
        ),
        (
            {"criterion": WrongCriterion(lambda weight: weight.abs().sum(dim=0))},
            r"criterion=Wrong.* must return a score for each weight, .* \(16,\)",
        ),
        (
            # `float` copies no float32.
            {"criterion": WrongCriterion(lambda weight: weight.float().abs_())},
            r"criterion=Wrong.* and solver='zero_out' must not change .* that of 0",
        ),
        (
            {"pattern": WrongPattern(torch.Tensor.float)},
            r"pattern=Wrong.* must return a boolean for each score, .* torch.float32",
        ),
        (
            {"pattern": WrongPattern(lambda keep: keep[0])},
            r"pattern=Wrong.* must return a boolean for each score, .* \(16,\)",
        ),
        (
            {"pattern": WrongPattern(torch.Tensor.bool), "solver": "sparsegpt"},
            r"pattern=Wrong.* must return a boolean for each score, .* torch.uint8",
        ),
        (
            {"solver": WrongSolver(lambda weight, keep: (weight * keep / 0, keep))},
            r"solver=Wrong.* must return a finite weight of the shape \(12, 16\) for 0",
        ),
        (
            {"solver": WrongSolver(lambda weight, keep: (weight[:1], keep[:1]))},
            r"solver=Wrong.* must return a finite weight .* one of the shape \(1, 16\)",
        ),
        (
            {"solver": WrongSolver(lambda weight, keep: (weight.mul_(keep), keep))},
            r"solver=Wrong.* must not change .* that of 0",
        ),
        (
            {"allocation": WrongAllocation()},
            r"allocation=Wrong.* must return a sparsity for each layer, .* for 2",
        ),
    ],
)
def test_a_mistake_is_refused_in_a_sentence_that_names_the_choice(model, batch, choice, message):
    with refuses(message):
        prune(model, [batch], **choice)


def test_a_class_without_a_dataclass_is_refused_since_the_report_would_lack_its_values():
    class Plain(Criterion):
        def __init__(self):
            self.power = 1

        def __call__(self, weight, inputs):
            return weight

    with refuses(r"criterion must be a dataclass, .* but Plain is none"):
        PruningConfig(criterion=Plain())


def test_the_page_lists_all_statistics():
    page = (Path(__file__).parents[1] / "docs/own_method.md").read_text(encoding="utf-8")
    listed = re.findall(r'^\| `"(\w+)"` \| .*`inputs', page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(SUMS)
