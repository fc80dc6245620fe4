"""Blocks that run again in the backward pass: with the gradients of autograd, and in less memory."""

import gc
import weakref
from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wanda_lightning.calibration.recomputing import recomputing


def put_nothing(shared, x, layer):
    return layer(x)


def put_into_object(shared, x, layer):
    shared["object"].tensors.append(layer(x))
    return torch.stack(shared["object"].tensors).sum(0)


def put_into_tensor(shared, x, layer):
    shared["tensor"] += layer(x)
    return shared["tensor"].clone()


def put_into_input(shared, x, layer):
    return layer(x.mul_(2))


class Block(nn.Module):
    """Takes keywords, changes what all blocks share, and returns a nested output with a number and indices."""

    def __init__(self, put):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.put = put
        self.calls = 0

    def forward(self, *, x, shared):
        self.calls += 1
        x = x + self.put(shared, x, self.linear).tanh()
        return {"x": x, "count": 3, "largest": x.argmax(-1)}


class Net(nn.Module):
    def __init__(self, *puts):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, puts))

    def forward(self, x):
        x = x.clone()
        shared = {"object": SimpleNamespace(tensors=[]), "tensor": torch.zeros_like(x)}
        for block in self.blocks:
            output = block(x=x, shared=shared)
            x = output["x"]
            assert (output["count"], output["largest"].dtype) == (3, torch.int64)
        return x


def recomputed_gradients(model, x, blocks):
    model.zero_grad()
    with recomputing(blocks):
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("put", "silent"),
    [
        *product((put_into_object, put_into_input), (None, 0, 1)),
        (put_into_tensor, None),
        (put_nothing, None),
    ],
)
def test_gradients_are_those_of_autograd(put, silent, frozen):
    """A frozen block passes gradients through, and may have none."""
    puts = [put_nothing if index == silent else put for index in range(3)]
    model = Net(*puts).double()
    model.blocks[:frozen].requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = recomputed_gradients(deepcopy(model), x, [])
    assert_close(recomputed_gradients(model, x, model.blocks), expected)
    assert all(gradient is None or gradient.abs().max() > 0 for gradient in expected)


@pytest.mark.parametrize(("with_gradients", "calls"), [(True, 2), (False, 1)])
def test_a_block_runs_again_only_for_gradients(with_gradients, calls):
    model = Net(put_nothing, put_nothing, put_nothing)
    with recomputing(model.blocks), torch.set_grad_enabled(with_gradients):
        output = model(torch.randn(4, 6)).sum()
        if with_gradients:
            output.backward()
    assert [block.calls for block in model.blocks] == [calls] * 3


def test_only_one_block_is_in_memory():
    """The tensors that the graph keeps do not grow with what a block computes inside."""
    wide = [nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 8)) for _ in range(3)]
    model = nn.Sequential(*wide)

    def numbers_kept(blocks):
        kept = []

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor

        with (
            recomputing(blocks),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(torch.randn(16, 8))
        return sum(kept)

    assert numbers_kept(model) * 10 < numbers_kept([])


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_graph(backward):
    """Not even until the next garbage collection, since a graph without a backward pass would never be collected."""
    model = Net(put_nothing, put_nothing, put_nothing)
    references = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, args, output: references.append(weakref.ref(output["x"]))
        )
    gc.collect()
    gc.disable()
    try:
        with recomputing(model.blocks):
            output = model(torch.randn(4, 6))
            if backward:
                output.sum().backward()
            del output
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
