"""What is walked in trees of tensors: batches, and the arguments of calls."""

import threading
from collections import namedtuple
from types import SimpleNamespace

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from wanda_lightning.calibration.trees import (
    clone_arguments,
    filled,
    map_tensors,
    take_out_tensors,
    tensors_within,
)


class Cache:
    def __init__(self):
        self.layers = [[torch.ones(2)]]
        self.owner = self


class Rows(dict):
    pass


Pair = namedtuple("Pair", ["first", "second"])


def test_containers_are_mapped_and_objects_are_left():
    cache = Cache()
    tree = {"pair": Pair(torch.ones(1), [torch.ones(2)]), "cache": cache, "text": "a"}
    others = {"text": "a", "cache": cache, "pair": Pair(torch.ones(3), [torch.ones(4)])}
    assert map_tensors(lambda *tensors: [len(tensor) for tensor in tensors], tree, others) == {
        "pair": Pair([1, 3], [[2, 4]]),
        "cache": cache,
        "text": "a",
    }


def test_references_to_one_object_remain_so():
    x = torch.ones(2)
    cache = Cache()
    one, other, twice = clone_arguments((cache, cache, {"x": (x, x)}))
    assert one is other is one.owner is not cache
    assert twice["x"][0] is twice["x"][1] is not x


def test_a_clone_of_containers_and_objects_can_be_written_into():
    cache = Cache()
    rows = Rows(a=[torch.ones(2)])
    cloned = clone_arguments([cache, rows])
    assert type(cloned[1]) is Rows
    for tensors in (cloned[0].layers[0], cloned[1]["a"]):
        tensors[0].add_(1)
        tensors.append(torch.ones(2))
    for tensors in (cache.layers[0], rows["a"]):
        assert [tensor.tolist() for tensor in tensors] == [[1, 1]]


def test_what_cannot_be_copied_and_modules_are_not():
    model = nn.Linear(2, 2)
    holder = SimpleNamespace(module=torch, lock=threading.Lock(), local=threading.local())
    cloned = clone_arguments([holder, model, Cache, torch.relu])
    assert vars(cloned[0]) == vars(holder)
    assert cloned[1:] == [model, Cache, torch.relu]


def test_what_is_too_deep_for_recursion_is_not_copied():
    first = last = SimpleNamespace()
    for _ in range(3000):
        last.next = last = SimpleNamespace()
    assert clone_arguments(first) is not first


def test_the_tensors_within_are_the_originals_each_once():
    x = torch.ones(2)
    y = torch.ones(3)
    cache = Cache()
    found = tensors_within([x, {"again": x, "y": (y,)}, cache, 3, nn.Linear(2, 2)])
    assert [id(tensor) for tensor in found] == [id(x), id(y), id(cache.layers[0][0])]


def test_tensors_that_are_taken_out_are_filled_in_again():
    cache = Cache()
    output = BaseModelOutput(torch.ones(2), hidden_states=(torch.ones(3), None))
    tensors, empty = take_out_tensors([output, {"cache": cache, "number": 3}])
    assert [len(tensor) for tensor in tensors] == [2, 3]
    result, others = filled(empty, [tensor + 1 for tensor in tensors])
    assert type(result) is BaseModelOutput
    assert torch.equal(result.hidden_states[0], torch.full((3,), 2.0))
    assert others == {"cache": cache, "number": 3}
