"""Blocks that run again in the backward pass, against ordinary autograd."""

import copy
import gc
import weakref
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wanda_lightning.calibration.gradients import recomputing


def put_nothing(shared, x, layer):
    return layer(x)


def put_into_object(shared, x, layer):
    shared["object"].tensors.append(layer(x))
    return torch.stack(shared["object"].tensors).sum(0)


def put_into_dict(shared, x, layer):
    shared["sum"] = shared.get("sum", 0) + layer(x)
    return shared["sum"]


def put_into_tensor(shared, x, layer):
    shared["tensor"] += layer(x)
    return shared["tensor"].clone()


def put_into_input(shared, x, layer):
    return layer(x.mul_(2))


class Block(nn.Module):
    """Takes keywords, puts something into what all blocks share, reads what earlier blocks have put there.

    It returns a nested output, which holds a number and indices, too.
    """

    def __init__(self, put):
        super().__init__()
        self.linear, self.put, self.calls = nn.Linear(6, 6), put, 0

    def forward(self, *, x, shared):
        self.calls += 1
        x = x + self.put(shared, x, self.linear).tanh()
        return {"x": x, "count": 3, "largest": x.argmax(-1)}


class Net(nn.Module):
    def __init__(self, *puts):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, puts))

    def forward(self, x):
        x, shared = x.clone(), {"object": SimpleNamespace(tensors=[]), "tensor": torch.zeros_like(x)}
        for block in self.blocks:
            output = block(x=x, shared=shared)
            x = output["x"]
            assert (output["count"], output["largest"].dtype) == (3, torch.int64)
        return x


def gradients(model, x, blocks):
    model.zero_grad()
    with recomputing(blocks):
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("put", "silent"),
    [
        *product((put_into_object, put_into_dict, put_into_input), (None, 0, 1)),
        (put_into_tensor, None),
        (put_nothing, None),
    ],
)
def test_gradients_are_those_of_autograd(put, silent, frozen):
    """A frozen block passes gradients through, and may have none."""
    torch.manual_seed(0)
    model = Net(*(put_nothing if index == silent else put for index in range(3))).double()
    model.blocks[:frozen].requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x, [])
    torch.testing.assert_close(gradients(model, x, model.blocks), expected)
    assert all(gradient is None or gradient.abs().max() > 0 for gradient in expected)


def test_without_gradients_a_block_runs_once_and_an_error_restores_it():
    model = Net(*[put_nothing] * 3)
    for repeated in (True, False):
        with recomputing(model.blocks), torch.set_grad_enabled(repeated):
            output = model(torch.randn(4, 6))
            if repeated:
                output.sum().backward()
    assert [block.calls for block in model.blocks] == [3, 3, 3]
    with pytest.raises(TypeError), recomputing(model.blocks):
        model.blocks[0]("no keyword")
    assert all("forward" not in vars(block) for block in model.blocks)


def test_only_one_block_is_in_memory():
    """The tensors that the graph keeps do not grow with what a block computes inside."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 8)) for _ in range(3)))
    kept = []

    def numbers(blocks):
        kept.clear()
        with recomputing(blocks):
            model(torch.randn(16, 8))
        return sum(kept)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        assert numbers(model) * 10 < numbers([])


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_graph(backward):
    """Not even until the next garbage collection, since a graph without a backward pass would never be collected."""
    model, held = Net(*[put_nothing] * 3), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output["x"])))
    gc.collect()
    gc.disable()
    try:
        with recomputing(model.blocks):
            output = model(torch.randn(4, 6))
            if backward:
                output.sum().backward()
            del output
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()
