"""Make experts unroutable while a mixture runs, without knowing how its router computes.

A router computes one logit for each expert as a product with its rows, and then whatever its model does: a softmax, a
sigmoid, a bias, groups, the largest few. PyTorch has no hook between the two inside one `forward`, so a torch-function
mode, active only inside the routers, replaces the logits in the result of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.patched import patched
from wanda_lightning.core.types import Units
from wanda_lightning.models.mixtures import Mixture

_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm, Tensor.addmm}


def _lowered(tensor: Tensor, experts: Units) -> Tensor:
    lowest = torch.finfo(tensor.dtype).min / 2  # finite, because a router may multiply it by 0
    return tensor.masked_fill(experts.to(tensor.device), lowest)


class _Lower(TorchFunctionMode):
    """Lower the logits of some experts."""

    def __init__(self, experts: Units) -> None:
        super().__init__()
        self._experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and result.shape[-1] == len(self._experts):
            return _lowered(result, self._experts)
        return result


@contextmanager
def unroutable(mixture: Mixture, experts: Units) -> Iterator[None]:
    """Give these experts the lowest logits and biases in this block."""

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Lower(experts):
            return forward(*args, **kwargs)

    with ExitStack() as stack:
        for router in mixture.routers:
            stack.enter_context(patched(router, "forward", partial(run, router.forward)))
        for tensor in (slot.tensor.detach() for slot in mixture.slots):
            if tensor.numel() == mixture.number and tensor.is_floating_point():  # for example a bias of the router
                stack.callback(tensor.copy_, tensor.clone())
                tensor.copy_(_lowered(tensor.flatten(), experts).view_as(tensor))
        yield
