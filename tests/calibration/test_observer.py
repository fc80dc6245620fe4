"""Statistics of the layers of a unit, against sums by hand."""

import weakref
from functools import partial

import pytest
import torch
from support.chains import Mlp, travel, vectors
from support.pairwise import with_nightly
from support.zoo import ZOO, run
from torch import nn

from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.models import find_layers
from wanda_lightning.parallel import SINGLE_PROCESS

NEEDS = frozenset(SUMS)


@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_statistics_are_freed_before_those_of_the_next_unit(sequential, monkeypatch):
    """The inputs of a layer are compared with those of the last one, whose Gram matrix may be large."""
    alive, held, update = weakref.WeakSet(), [], InputStatistics.update
    monkeypatch.setattr(InputStatistics, "update", lambda *args: held.append(len(alive)) or update(*args))
    model, observer = nn.Sequential(nn.Linear(8, 8), Mlp(), nn.Linear(8, 8), Mlp()), Observer(NEEDS)
    units = find_layers(model, sequential).units
    assert len(units) == (4 if sequential == "block" else 6)
    for unit, calls in travel(model, vectors(1), [unit.module for unit in units]):
        alive.update(observer(units[unit], calls).values())
    assert held == [0] * 6


SAMPLED = (
    *("llama_padded", "gpt_oss", "t5", "vit", "convnext", "block_twice", "tied", "routed", "expert_list"),
    *("plain_mlp", "inplace", "torch_transformer"),
)


@pytest.mark.parametrize("name", with_nightly(SAMPLED, ZOO))
def test_the_dense_model_side_by_side_has_the_sums_of_one_batch_after_another(name):
    model = ZOO[name].build()
    plan = make_plan(PruningConfig.from_names(), model)
    data = Samples(model, ZOO[name].batches(), partial(run, model), None, SINGLE_PROCESS, "a test")
    observer = Observer(NEEDS)
    with pruning_mode(model):
        expected = observer.whole_model(model, plan.whole_model, data, lambda: None)
        for unit, calls in lockstep(model, plan.parts, data.hold(), to_end=True):
            calls[:] = [observer.watched(unit, call) for call in calls]
        found = observer.finish(plan.whole_model)
    assert found.keys() == expected.keys()
    # Visits to one block are added in another order.
    same = partial(torch.allclose, atol=1e-4) if name in ("block_twice", "tied") else torch.equal
    for layer, statistics in expected.items():
        assert found[layer].count == statistics.count
        assert all(same(found[layer].sums[each], statistics.sums[each]) for each in NEEDS), layer
