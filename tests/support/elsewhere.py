"""A second device, without one."""

import torch


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on another device, and can only be combined with tensors that are there, too."""

    device = torch.device("cuda", 1)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        tensors = [x for group in args if isinstance(group, list | tuple) for x in group if isinstance(x, torch.Tensor)]
        if len({type(x) is cls for x in tensors}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result
