"""Which layer a tensor is a view of."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from wanda_lightning.calibration.weight_memory import WeightMemory
from wanda_lightning.models import find_layers


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 6, 8))
        self.num_experts, self.hidden_size = 4, 8


@pytest.fixture
def model():
    return nn.ModuleDict({"first": nn.Linear(8, 6), "second": nn.Linear(8, 6), "experts": Experts()})


def matched(memory, weight):
    return [(match.layer.name, match.slot, match.row) for match in memory.matches(weight.detach())]


def test_experts_alone_and_together(model):
    memory, stack = WeightMemory(find_layers(model).layers), model["experts"].up_proj
    assert matched(memory, stack[2].mT) == [("experts.up_proj.2", None, 0)]
    assert matched(memory, stack[1:3].mT) == [("experts.up_proj.1", 0, 0), ("experts.up_proj.2", 1, 0)]
    assert matched(memory, stack[3].expand(5, -1, -1).mT) == [("experts.up_proj.3", None, 0)]
    assert memory.has_experts


def test_without_plain_matrices_there_is_nothing_to_recognize():
    with torch.device("meta"):
        abstract = nn.Sequential(nn.Linear(8, 6))
    images = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    for each in (abstract, images):
        assert len(WeightMemory(find_layers(each).layers)) == 0


def test_a_weight_that_is_freed_does_not_stay_in_memory(model):
    array = np.ones((6, 8), dtype=np.float32)
    model["first"].weight = nn.Parameter(torch.from_numpy(array))
    memory, freed = WeightMemory(find_layers(model).layers), weakref.ref(array)
    assert matched(memory, model["first"].weight.mT) == [("first", None, 0)]
    del array
    assert freed() is not None
    model["first"].weight = nn.Parameter(torch.zeros(6, 8))
    assert freed() is None
