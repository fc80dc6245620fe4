"""Recompute blocks in the backward pass instead of keeping their activations."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.surroundings import Replay, refuse_transforms
from wanda_lightning.calibration.torch_internals import write_count
from wanda_lightning.calibration.trees import (
    clone_arguments,
    filled,
    take_out_tensors,
    tensors_within,
)
from wanda_lightning.common.aliases import Forward
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import wide_dtype

# Kernels that add in no fixed order may differ by rounding, also in 16 bits.
_TOLERANCE = 1e-2


@contextmanager
def recomputing(blocks: Sequence[Module]) -> Iterator[None]:
    """Recompute the blocks in every backward pass inside this `with` block; without gradients nothing changes.

    Only the inputs of each block are stored until then (Chen et al. 2016, arXiv 1604.06174). A block may take and
    return any nested structure of tensors. The second run sees the same modes and context variables as the first. It
    sees attributes of the modules around the block as the forward pass has left them; if the block then computes
    something else, an error says so. No gradient passes from one block to another in a context variable.

    A block is not recomputed if it writes into its arguments, or receives an object with tensors, such as a key-value
    cache.
    """
    with ExitStack() as restored:
        for block in blocks:
            recomputed = _Recomputed(type(block).__name__, block.forward)
            restored.enter_context(patched(block, "forward", recomputed))
        yield


@dataclass(eq=False)
class _Recomputed:
    """The forward of a block that runs again in the backward pass, with gradients enabled."""

    name: str  # of the class, for a message
    forward: Forward
    writes: bool = False  # into its arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, without keeping its activations if it can be recomputed."""
        if self.writes or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        refuse_transforms(self.name)

        # The graph holds `run`. If `run` held a tensor of the graph, neither would ever be freed.
        tensors, arguments = take_out_tensors((args, kwargs))
        if tensors_within(arguments):
            return self.forward(*args, **kwargs)
        replay = Replay()
        # Another block may write into them before the second run.
        arguments = clone_arguments(arguments)
        output_structure = None
        sums: list[Tensor] = []  # of the first run

        def run(anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal output_structure
            clones = [tensor.clone() for tensor in tensors]
            output = self._run(replay, filled(clone_arguments(arguments), clones))
            outputs, output_structure = take_out_tensors(output)
            self._refuse_if_different(sums, outputs)
            if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in outputs):
                outputs = [_attached(tensor, anchor) for tensor in outputs]
            return tuple(outputs)

        # `checkpoint` needs an input that requires a gradient, and the inputs of the first block do not.
        device = tensors[0].device if tensors else None
        anchor = torch.zeros((), requires_grad=True, device=device)
        outputs = checkpoint(run, anchor, *tensors, use_reentrant=True)
        if self.writes:
            return self.forward(*args, **kwargs)
        return filled(output_structure, outputs)

    def _refuse_if_different(self, sums: list[Tensor], outputs: Sequence[Tensor]) -> None:
        """Refuse outputs whose sums are others than in the first run, which only stores them."""
        again = [tensor.detach().abs().sum(dtype=wide_dtype(tensor)) for tensor in outputs]
        if not sums:
            sums.extend(again)
        elif not all(map(partial(torch.allclose, rtol=_TOLERANCE, equal_nan=True), sums, again)):
            raise UserError(
                f"{self.name} must compute the same when it runs again in the backward pass, but it does not: the "
                "model changes something between its blocks that they read. Use allocation='uniform' and "
                "recovery='none', or by='equal'."
            )

    def _run(self, replay: Replay, arguments: Any) -> Any:
        """Run the forward, and note whether it writes into its arguments."""
        args, kwargs = arguments
        forward = partial(self.forward, *args, **kwargs)
        tensors = tensors_within(arguments)
        before = [(id(tensor), write_count(tensor)) for tensor in tensors]
        # The first run has no gradients, and the second is somewhere else: in the backward pass.
        output = replay.run(forward) if torch.is_grad_enabled() else forward()
        after = [(id(tensor), write_count(tensor)) for tensor in tensors_within(arguments)]
        self.writes = self.writes or before != after
        return output


def _attached(output: Tensor, anchor: Tensor) -> Tensor:
    """Return an output of a block without trained weights as a part of the graph; an output of indices cannot be."""
    if not output.is_floating_point():
        return output
    return output + anchor.to(output.dtype)
