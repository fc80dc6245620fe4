"""Store only the inputs of each block for the backward pass, and run the block again there (Chen et al. 2016).

PyTorch's `checkpoint` expects a function that takes and returns tensors. A block may take and return any nested
structure of tensors, and may be called with keyword arguments only. This file wraps blocks for `checkpoint`.

The second run must compute the same as the first. So a block runs as usual, and its activations stay in memory, if it
writes into its arguments, which the first run shows, or if it receives an object with tensors, which another block may
have written and may write again. In transformers these are key-value caches, and the keys and values that the layers of
Gemma 4 share. (Transformers' own gradient checkpointing withholds the cache from such blocks.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from wanda_lightning.calibration.cloning import clone_arguments, tensors_within
from wanda_lightning.calibration.mode import patched


@contextmanager
def recomputing(blocks: Sequence[nn.Module], mode: AbstractContextManager[Any] = nullcontext()) -> Iterator[None]:
    """Recompute the blocks in every backward pass inside this `with` block; without gradients nothing changes.

    The second run enters `mode`, because a torch-function mode is not active inside a backward pass.
    """
    with ExitStack() as restored:
        for block in blocks:
            restored.enter_context(patched(block, "forward", _Recomputed(block.forward, mode)))
        yield


class _Recomputed:
    """The forward of a block that runs again in the backward pass, with gradients enabled and inside `mode`."""

    def __init__(self, forward: Callable[..., Any], mode: AbstractContextManager[Any]) -> None:
        self._forward, self._mode = forward, mode
        self._writes = False  # into its arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, without keeping its activations if it can be recomputed."""
        if self._writes or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        inputs, structure = tree_flatten((args, kwargs))
        # The graph holds `run`. If `run` held a tensor of the graph, neither would ever be freed.
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        inputs = [_ATensor if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        if tensors_within(inputs):
            return self._forward(*args, **kwargs)
        inputs = clone_arguments(inputs)  # another block may write into them before the second run
        outputs: list[Any] = []
        output_structure: Any = None

        def run(anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal outputs, output_structure
            clones = (tensor.clone() for tensor in tensors)
            own = tree_unflatten(_filled(clone_arguments(inputs), clones), structure)
            held = tensors_within(own)
            versions = [tensor._version for tensor in held]
            with self._mode if torch.is_grad_enabled() else nullcontext():
                leaves, output_structure = tree_flatten(self._forward(*own[0], **own[1]))
            self._writes = self._writes or _were_written(own, held, versions)
            found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            outputs = [_ATensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in found):
                found = [tensor + anchor.to(tensor.dtype) if tensor.is_floating_point() else tensor for tensor in found]
            return tuple(found)

        # `checkpoint` needs an input that requires a gradient, and the inputs of the first block do not.
        anchor = torch.zeros((), requires_grad=True, device=tensors[0].device if tensors else None)
        results = checkpoint(run, anchor, *tensors, use_reentrant=True)
        if self._writes:
            return self._forward(*args, **kwargs)
        return tree_unflatten(_filled(outputs, iter(results)), output_structure)


class _ATensor:
    """Placeholder for a tensor."""


def _filled(leaves: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    return [next(tensors) if leaf is _ATensor else leaf for leaf in leaves]


def _were_written(arguments: Any, held: Sequence[Tensor], versions: Sequence[int]) -> bool:
    """Return whether the arguments hold other tensors than before, or tensors with other values."""
    found = tensors_within(arguments)
    return list(map(id, found)) != list(map(id, held)) or [tensor._version for tensor in found] != versions
