"""What is cloned of the arguments of a call."""

import threading
from types import SimpleNamespace

import torch
from torch import nn

from wanda_lightning.calibration.trees import clone_arguments, tensors_within


class Cache:
    def __init__(self):
        self.layers = [[torch.ones(2)]]
        self.owner = self


class Slotted:
    __slots__ = ("kept",)


class Rows(dict):
    pass


def test_objects_are_copied_once_with_their_tensors_but_no_module():
    x = torch.ones(2)
    cache = Cache()
    slotted = Slotted()
    rows = Rows(a=[torch.ones(2)])
    model = nn.Linear(2, 2)
    slotted.kept = [torch.ones(2)]
    first = last = SimpleNamespace(module=torch, lock=threading.Lock(), local=threading.local())
    for _ in range(3000):  # too deep for recursion
        last.next = last = SimpleNamespace()
    other = clone_arguments(
        (cache, cache, {"twice": (x, x)}, slotted, rows, first, model, Cache, torch.relu)
    )
    assert other[0] is other[1] is other[0].owner is not cache
    assert other[2]["twice"][0] is other[2]["twice"][1] is not x
    assert type(other[4]) is Rows
    for kept in (other[0].layers[0], other[3].kept, other[4]["a"]):
        kept[0].add_(1)
        kept.append(x)
    for own in (cache.layers[0], slotted.kept, rows["a"]):
        assert [tensor.tolist() for tensor in own] == [[1, 1]]
    assert other[5].lock is first.lock
    assert other[6:] == (model, Cache, torch.relu)


def test_the_tensors_within_are_the_originals_each_once():
    x = torch.ones(2)
    y = torch.ones(3)
    cache = Cache()
    found = tensors_within([x, {"again": x, "y": (y,)}, cache, 3, nn.Linear(2, 2)])
    assert [id(tensor) for tensor in found] == [id(x), id(y), id(cache.layers[0][0])]
