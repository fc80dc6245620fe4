"""Blocks that run again in the backward pass, against ordinary autograd."""

import copy
import gc
import weakref
from itertools import product

import pytest
import torch
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from wanda_lightning.calibration.recomputation import recomputing


class Block(nn.Module):
    """Takes keywords, and returns a nested output that holds a number and indices, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0

    def forward(self, *, state, scale=1.0):
        self.calls += 1
        x = state["x"] * scale
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
    with recomputing(getattr(model, "blocks", list(model.children())) if recomputed else ()):
        model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_gradients_of_autograd(model):
    model, x = model.double(), torch.randn(4, 6, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x, recomputed=False)
    torch.testing.assert_close(gradients(model, x, recomputed=True), expected)
    return expected


@pytest.mark.parametrize("frozen", [0, 2])
def test_gradients_are_those_of_autograd(frozen):
    """A frozen block passes gradients through, and may have none."""
    torch.manual_seed(0)
    model = Net()
    model.blocks[:frozen].requires_grad_(False)
    assert_gradients_of_autograd(model)
    assert [block.calls for block in model.blocks] == [2, 2, 2]
    assert all("forward" not in vars(block) for block in model.blocks)


class Cache:
    def __init__(self):
        self.tensors = []


def put_into_object(shared, x):
    shared["object"].tensors.append(x)
    return torch.stack(shared["object"].tensors).sum(0)


def put_into_dict(shared, x):
    shared["dict"]["sum"] = shared["dict"].get("sum", 0) + x
    return shared["dict"]["sum"]


def put_into_tensor(shared, x):
    shared["tensor"] += x
    return shared["tensor"].clone()


class Writer(nn.Module):
    """Appends to what all blocks share, and reads what earlier blocks appended."""

    def __init__(self, put):
        super().__init__()
        self.linear, self.put = nn.Linear(6, 6), put

    def forward(self, x, shared):
        return x + self.put(shared, self.linear(x).tanh())


class Sharing(nn.Module):
    def __init__(self, put, writes=(True, True, True)):
        super().__init__()
        self.blocks = nn.ModuleList(Writer(put if each else lambda shared, x: x) for each in writes)

    def forward(self, x):
        shared = {"object": Cache(), "dict": {}, "tensor": torch.zeros_like(x)}
        for block in self.blocks:
            x = block(x, shared)
        return x


@pytest.mark.parametrize(
    ("put", "writes"),
    [
        *product((put_into_object, put_into_dict), ((True, True, True), (False, True, True), (True, False, True))),
        (put_into_tensor, (True, True, True)),
    ],
)
def test_blocks_may_write_into_their_arguments(put, writes):
    torch.manual_seed(0)
    assert all(each.abs().max() > 0 for each in assert_gradients_of_autograd(Sharing(put, writes)))


def test_a_block_may_write_into_the_output_of_the_last_one():
    """Which may be a view."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            x.mul_(2)
            return (x + self.linear(x).tanh()).view(2, 2, 6).view(4, 6)

    torch.manual_seed(0)
    assert_gradients_of_autograd(
        nn.Sequential(nn.Linear(6, 6), InPlace(), nn.Sequential(nn.Linear(6, 6), nn.Flatten()), InPlace())
    )


def test_keys_that_layers_share():
    """The last layers of Gemma 4 read the keys and values of earlier ones."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        vocab_size=64,
        num_attention_heads=2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        head_dim=16,
        vocab_size_per_layer_input=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_key_value_heads=2,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        sliding_window=4,
    )
    model = Gemma4ForCausalLM(config).double().eval()
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for blocks in ((), model.model.layers):
        model.zero_grad()
        with recomputing(blocks):
            model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.model.layers.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


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
