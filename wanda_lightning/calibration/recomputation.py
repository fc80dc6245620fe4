"""Store only the inputs of each block for the backward pass, and run the block again there (Chen et al. 2016).

PyTorch's `checkpoint` expects a function that takes and returns tensors. A block may take and return any nested
structure of tensors, may be called with keyword arguments only, and may write into its inputs. This file wraps blocks
for `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from wanda_lightning.calibration.patched import patched


@contextmanager
def recomputing(blocks: Sequence[nn.Module], mode: AbstractContextManager[Any] = nullcontext()) -> Iterator[None]:
    """Recompute the blocks in every backward pass inside this `with` block; without gradients nothing changes.

    Args:
        blocks: Modules of which none contains another.
        mode: Entered around the second run, because a torch-function mode is not active inside a backward pass.
    """
    with ExitStack() as restored:
        for block in blocks:
            restored.enter_context(patched(block, "forward", partial(_run, block.forward, mode)))
        yield


def _run(forward: Callable[..., Any], mode: AbstractContextManager[Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    inputs, structure = tree_flatten((args, kwargs))
    # The graph holds `run`. If `run` held a tensor of the graph, neither would ever be freed.
    tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    inputs = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in inputs]
    outputs: list[Any] = []
    output_structure: Any = None

    def run(anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal outputs, output_structure
        clones = (tensor.clone() for tensor in tensors)  # the block may write into them
        own_args, own_kwargs = tree_unflatten(_filled(inputs, clones), structure)
        with mode if torch.is_grad_enabled() else nullcontext():
            leaves, output_structure = tree_flatten(forward(*own_args, **own_kwargs))
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outputs = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in found):
            found = [tensor + anchor.to(tensor.dtype) if tensor.is_floating_point() else tensor for tensor in found]
        return tuple(found)

    # `checkpoint` needs an input that requires a gradient, and the inputs of the first block do not.
    anchor = torch.zeros((), requires_grad=True, device=tensors[0].device if tensors else None)
    results = checkpoint(run, anchor, *tensors, use_reentrant=True)
    return tree_unflatten(_filled(outputs, iter(results)), output_structure)


_TENSOR = object()  # placeholder for a tensor


def _filled(leaves: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    return [next(tensors) if leaf is _TENSOR else leaf for leaf in leaves]
