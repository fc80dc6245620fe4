"""Find out cheaply whether a model calls a unit again after all units were visited.

ALBERT and looped models apply one block many times. The engine ends after the first pass over the units, so it would
not notice that the statistics miss later visits. Therefore one batch continues after the last unit. A global forward
hook ends it before an expensive computation, at the first module that has a matrix and contains no unit, such as the
output head. Only a global hook sees the calls of all modules without changing each of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from wanda_lightning.calibration.batch_thread import BatchThread, StopForward


def find_revisits(thread: BatchThread, units: Sequence[nn.Module], revisited: set[int]) -> None:
    """Continue a batch after the last unit, and add to `revisited` the indices of the units that it reaches again."""
    inside = set(units)

    def stop(module: nn.Module, args: object) -> None:
        if threading.current_thread() is not thread or not inside.isdisjoint(module.modules()):
            return
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            raise StopForward

    hook = register_module_forward_pre_hook(stop)
    try:
        with suppress(Exception):  # the output of the model does not matter here, so neither do its errors
            thread.run_unit()
            while thread.call is not None and thread.unit not in revisited:
                revisited.add(thread.unit)
                thread.run_unit()
    finally:
        hook.remove()
