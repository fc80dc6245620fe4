"""Blocks that run again in the backward pass, against ordinary autograd."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from wanda_lightning.calibration.recomputation import recomputing


class Block(nn.Module):
    """Takes keywords, writes into its input, and returns a nested output that holds a number and indices, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0

    def forward(self, *, state, scale=1.0):
        self.calls += 1
        x = state["x"]
        x.mul_(scale)
        return {"x": x + self.linear(x).tanh(), "count": 3, "largest": x.argmax(-1)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            output = block(state={"x": x.clone()}, scale=0.5)
            x = output["x"]
            assert output["count"] == 3
            assert output["largest"].dtype == torch.int64
        return x


def gradients(model, x, recomputed):
    model.zero_grad()
    with recomputing(model.blocks if recomputed else ()):
        model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 6, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x, recomputed=False)
    for one, other in zip(expected, gradients(model, x, recomputed=True), strict=True):
        torch.testing.assert_close(one, other)
    assert [block.calls for block in model.blocks] == [2, 2, 2]
    assert all("forward" not in vars(block) for block in model.blocks)


def test_a_frozen_block_passes_gradients_through_and_may_have_none():
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 6, dtype=torch.float64)
    for block in (model.blocks[0], model.blocks[1]):
        block.requires_grad_(False)
    expected = gradients(copy.deepcopy(model), x, recomputed=False)
    for one, other in zip(expected, gradients(model, x, recomputed=True), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_without_gradients_a_block_runs_once():
    model = Net()
    with recomputing(model.blocks), torch.no_grad():
        model(torch.randn(4, 6))
    assert [block.calls for block in model.blocks] == [1, 1, 1]


def test_only_one_block_is_in_memory():
    """The tensors that the graph keeps do not grow with what a block computes inside."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 512), nn.Linear(512, 8)

        def forward(self, x):
            return x + self.down(self.up(x).tanh())

    model = nn.Sequential(Wide(), Wide(), Wide())
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with recomputing(list(model)):
            model(torch.randn(16, 8))
        recomputed, kept = sum(kept), []
        model(torch.randn(16, 8))
    assert recomputed * 10 < sum(kept)


def test_the_forward_is_restored_after_an_error():
    model = Net()
    with pytest.raises(TypeError), recomputing(model.blocks):
        model.blocks[0]("no keyword")
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_graph(backward):
    """Not even until the next garbage collection, since a graph without a backward pass would never be collected."""
    model, held = Net(), []
    handles = [
        block.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output["x"])))
        for block in model.blocks
    ]
    gc.collect()
    gc.disable()
    try:
        with recomputing(model.blocks):
            output = model(torch.randn(4, 6))
            if backward:
                output.sum().backward()
            del output
        assert len(held) == 3
        assert not any(reference() is not None for reference in held)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
