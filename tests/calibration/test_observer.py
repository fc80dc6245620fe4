"""Statistics of the layers of a unit, against sums by hand."""

import weakref
from functools import partial

import pytest
import torch
from support.chains import travel
from support.elsewhere import Elsewhere
from support.pairwise import with_nightly
from support.zoo import ZOO, run
from torch import nn

from wanda_lightning import prune
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.calibration.unit_stops import stop_at_units, watch_units
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.models import find_layers
from wanda_lightning.parallel import SINGLE_PROCESS

NEEDS = frozenset(SUMS)


class Scaling(nn.Module):
    """A block that centers its input if that is large, in place or not: only some batches are written into."""

    def __init__(self, in_place):
        super().__init__()
        self.up, self.down, self.in_place = nn.Linear(8, 16), nn.Linear(16, 8), in_place

    def forward(self, x):
        if x.abs().max() > 5:
            x = x.mul_(0.1).sub_(1) if self.in_place else x * 0.1 - 1
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("large", [[1], [0], [0, 2], [2]])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_batches_that_a_unit_writes_into_are_pruned_as_any_other(large, sequential):
    models = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Scaling(in_place), Scaling(in_place))
        batches = [torch.randn(2, 3, 8) * (20 if index in large else 1) for index in range(3)]
        prune(model, batches, sequential=sequential, progress=False)
        models.append(model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_statistics_are_freed_before_those_of_the_next_unit(sequential, monkeypatch):
    """The inputs of a layer are compared with those of the last one, whose Gram matrix may be large."""
    alive, held, update = weakref.WeakSet(), [], InputStatistics.update
    monkeypatch.setattr(InputStatistics, "update", lambda *args: held.append(len(alive)) or update(*args))
    model, observer = nn.Sequential(nn.Linear(8, 8), Scaling(False), nn.Linear(8, 8), Scaling(False)), Observer(NEEDS)
    units = find_layers(model, sequential).units
    assert len(units) == (4 if sequential == "block" else 6)
    for stop in travel(model, [torch.randn(2, 8)], [unit.module for unit in units]):
        alive.update(observer(units[stop.unit], stop.calls).values())
    assert held == [0] * 6


SAMPLED = (
    *("llama_padded", "gpt_oss", "t5", "vit", "convnext", "block_twice", "tied", "routed", "expert_list"),
    *("plain_mlp", "inplace", "torch_transformer"),
)


@pytest.mark.parametrize("name", with_nightly(SAMPLED, ZOO))
def test_the_dense_model_side_by_side_has_the_sums_of_one_batch_after_another(name):
    model = ZOO[name].build()
    plan, held = make_plan(PruningConfig.from_names(), model), []
    data = Samples(model, ZOO[name].batches(), partial(run, model), None, SINGLE_PROCESS, "a test")
    observer = Observer(NEEDS)
    with pruning_mode(model):
        (stop,) = stop_at_units(model, [plan.whole_model], data, SINGLE_PROCESS, set())
        expected = stop.observe(observer, lambda calls: calls)
        visited = [unit.name for unit in watch_units(plan.parts, data, observer, held.append)]
        found = observer.finish(plan.whole_model)
    assert found.keys() == expected.keys()
    # Visits to one block are added in another order.
    same = partial(torch.allclose, atol=1e-4) if name in ("block_twice", "tied") else torch.equal
    for layer, statistics in expected.items():
        assert found[layer].count == statistics.count
        assert all(same(found[layer].sums[each], statistics.sums[each]) for each in NEEDS), layer
    assert set(visited) == set(held)


class Move(nn.Module):
    def forward(self, x):
        return x.as_subclass(Elsewhere)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_a_model_that_is_spread_over_devices(sequential):
    """As by device_map: the second half gets its inputs on another device."""
    models = []
    for move in (nn.Identity(), Move()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), move, nn.Linear(16, 8), nn.Linear(8, 8))
        prune(model, [torch.randn(4, 8) for _ in range(2)], sequential=sequential, progress=False)
        models.append(model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
