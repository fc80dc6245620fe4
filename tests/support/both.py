"""The same run on the CPU and on the device of `support.remote`."""

import torch
from torch.utils._pytree import tree_map_only

DEVICES = ("cpu", "remote:0")


def on(device, value):
    """Move all tensors of a batch."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def assert_equal(on_cpu, on_device):
    """Weights and buffers are equal to the bit; those of a model that is not spread are on one device."""
    expected, found = on_cpu.state_dict(), on_device.state_dict()
    assert expected.keys() == found.keys()
    differ = [name for name in expected if not torch.equal(_bits(expected[name]), _bits(found[name].cpu()))]
    assert not differ
    assert {tensor.device.type for tensor in expected.values()} == {"cpu"}
    assert "remote" in {tensor.device.type for tensor in found.values()}


def _bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)
