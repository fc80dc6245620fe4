"""What is cloned of the arguments of a call."""

import threading

import torch
from torch import nn

from wanda_lightning.calibration.cloning import clone_arguments, tensors_within


class Cache:
    def __init__(self):
        self.layers, self.total, self.owner = [[torch.ones(2)]], 0, self


def test_an_object_is_copied_once_with_its_tensors_but_no_module():
    cache, model = Cache(), nn.Linear(2, 2)
    other = clone_arguments((cache, cache, model, Cache, torch.relu))
    assert other[0] is other[1] is other[0].owner is not cache
    assert other[2:] == (model, Cache, torch.relu)
    assert other[0].layers[0][0].data_ptr() != cache.layers[0][0].data_ptr()


class Slotted:
    __slots__ = ("kept",)

    def __init__(self):
        self.kept = [torch.ones(2)]


class Rows(dict):
    pass


def test_what_is_copied_of_odd_objects():
    x, slotted, rows, lock = torch.ones(2), Slotted(), Rows(a=[torch.ones(2)]), threading.Lock()
    own = {"twice": (x, x), "slotted": slotted, "rows": rows}
    other = clone_arguments(own)
    assert other["twice"][0] is other["twice"][1] is not x
    assert type(other["rows"]) is Rows
    for kept in (other["slotted"].kept, other["rows"]["a"]):
        kept[0].add_(1)
        kept.append(x)
    assert (len(slotted.kept), len(rows["a"])) == (1, 1)
    assert slotted.kept[0].tolist() == rows["a"][0].tolist() == [1, 1]

    class Context:
        def __init__(self):
            self.module, self.lock, self.local, self.next = torch, lock, threading.local(), None

    first = last = Context()
    for _ in range(3000):
        last.next = last = Context()
    assert clone_arguments(first).lock is lock


def test_the_tensors_within_are_the_originals_each_once():
    x, y = torch.ones(2), torch.ones(3)
    cache = Cache()
    found = tensors_within([x, {"again": x, "y": (y,)}, cache, 3, nn.Linear(2, 2)])
    assert [id(tensor) for tensor in found] == [id(x), id(y), id(cache.layers[0][0])]
