"""Pass samples forward and backward side by side, so that each block is needed once in each direction.

Every sample has a thread, as in lockstep. Forward, it parks at each block as usual. Backward, autograd reaches the
blocks in reverse order and runs each again (see `recomputation`); there the sample parks at a stop of its own, before
the block is run. So all samples run through a block, forward or backward, before any runs through the next one. The
gradients are the same as those of one sample after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from wanda_lightning.calibration.batch_thread import park
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.patched import patched
from wanda_lightning.calibration.recomputation import Recomputed
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.common.errors import UserError
from wanda_lightning.models import Unit


def pass_side_by_side(
    passes: Sequence[Sample], blocks: Sequence[Unit], mode: AbstractContextManager[Any], hold: Callable[[str], None]
) -> None:
    """Run samples whose `forward` also passes backward, side by side; refuse a block that cannot be recomputed.

    They need the torch-function mode `mode`, which is active already in this thread. `hold` is called with the
    name of a block before a sample runs through it, forward or backward.
    """
    stops = [*blocks, *reversed(blocks)]
    random = torch.get_rng_state()  # recomputation saves and restores it in each thread
    try:
        with ExitStack() as restored:
            for index, block in enumerate(blocks):
                assert block.module is not None
                stopping = _Stopping(block, (index, len(stops) - 1 - index), mode, hold)
                restored.enter_context(patched(block.module, "forward", stopping))
            held = [replace(each, forward=partial(_run, each.forward, mode)) for each in passes]
            for _ in lockstep(held, [None] * len(stops), [stop.name for stop in stops], to_end=True):
                pass
    finally:
        torch.set_rng_state(random)


def _run(run: Callable[[], object], mode: AbstractContextManager[Any]) -> None:
    # Without threads of its own, autograd runs the blocks of any device in this thread, which parks at them.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False), mode:
        run()


class _Stopping(Recomputed):
    """The forward of a block at which samples park twice: before it runs, and before it runs again."""

    def __init__(
        self, block: Unit, stops: tuple[int, int], mode: AbstractContextManager[Any], hold: Callable[[str], None]
    ) -> None:
        assert block.module is not None
        super().__init__(self._run, mode)
        self._own, self._name, self._stops, self._hold = block.module.forward, block.name, stops, hold

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Park, and run the block without keeping its activations."""
        return park(self._stops[0], partial(self._held, super().__call__, torch.is_grad_enabled()), *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; park before, if it runs again."""
        if not torch.is_grad_enabled():
            return self._own(*args, **kwargs)
        return park(self._stops[1], partial(self._held, self._own, True), *args, **kwargs)

    def _held(self, forward: Callable[..., Any], has_gradients: bool, *args: Any, **kwargs: Any) -> Any:
        self._hold(self._name)
        with torch.set_grad_enabled(has_gradients):  # a parked call runs in another thread, without gradients
            return forward(*args, **kwargs)

    def run_once(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the block: its weights would have to stay in memory until the backward pass."""
        raise UserError(
            f"allocation and pattern read gradients, for which each block runs twice, but {self._name} cannot run "
            "twice from disk: it writes into its inputs, or shares an object with other blocks. Prune in memory, or "
            "choose allocation='owl' and pattern='unstructured_layer'."
        )
