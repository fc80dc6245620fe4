"""Run all calibration batches through any model side by side, and stop at each unit.

The model's own forward runs unchanged, once for each batch, each in a thread of its own. While the engine is active,
the `forward` of every unit parks the batch that calls it. Only one thread runs at a time: the scheduler, which is the
caller's thread, or one batch. The scheduler advances each batch until it is parked or finished, and passes the parked
calls of one unit to the caller, which may run the unit on them, change its weights, or both. Then the scheduler runs
the unit on each call, returns the outputs to the batches, and continues. Several processes with their own batches stop
at the same units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from torch import nn

from wanda_lightning.calibration.batch_thread import BatchThread, Call, Stalled, park
from wanda_lightning.calibration.openmp import keeps_many_workers
from wanda_lightning.calibration.patched import patched
from wanda_lightning.calibration.revisits import find_revisits
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.thread_state import ThreadState
from wanda_lightning.common.errors import UserError
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, entry_point, is_sharded


class Stop(NamedTuple):
    """All batches that are parked at one unit."""

    unit: int  # index of the unit
    calls: list[Call]  # one for each batch at the unit; empty if only other processes are there


def lockstep(
    samples: Sequence[Sample],
    units: Sequence[nn.Module | None],
    names: Sequence[str] = (),
    processes: Processes = SINGLE_PROCESS,
    revisited: set[int] | None = None,
    to_end: bool = False,
    prepared: Callable[[int, Call], Call] = lambda unit, call: call,
) -> Iterator[Stop]:
    """Stop once at each unit that a batch reaches, with all batches that are parked there.

    If batches are parked at different units, the next stop is at the first of these in the given order. A batch that
    reaches a unit again, because the model applies it several times, runs through it without a stop. After the last
    unit every batch ends, so the rest of the model is not computed. Only one batch continues, up to the next module
    with a matrix of its own, to find out whether the model calls a unit again.

    Units are disjoint modules in the order of the stops; None is a stop at which batches `park` themselves. `revisited`
    receives the index of every unit that a batch reaches again. With `to_end`, the batches run to the end of the model
    after the last unit. `prepared` takes the index of a unit and the call of it with which a batch will continue, and
    returns the call to run.

    Yields:
        The stops, whose calls are valid until the next one. Closing the generator, or an exception, ends all threads
        and restores the modules.
    """
    revisited = set() if revisited is None else revisited
    pending = set(range(len(units)))
    names = names or [type(unit).__name__ for unit in units]
    with _parking(units), _batch_threads(samples, names) as threads:
        with processes.fail_together():
            for thread in threads:
                thread.start()
                thread.advance()
        while True:
            parked = [thread for thread in threads if thread.call is not None]
            unit = processes.all_reduce_min(min((thread.unit for thread in parked), default=len(units)))
            if unit == len(units):
                return
            here = [thread for thread in parked if thread.unit == unit]
            if unit in pending:
                stop = Stop(unit, [thread.call for thread in here if thread.call is not None])
                yield stop
                stop.calls.clear()  # or parked activations would outlive the run of the unit
                pending.remove(unit)
            else:
                revisited.add(unit)
            if not pending and not to_end:
                modules = [unit for unit in units if unit is not None]
                # FSDP2 communicates: all processes continue, or none.
                if processes.all_agree(bool(here)) if any(map(is_sharded, modules)) else here:
                    find_revisits(here[0], modules, revisited)
                return
            with processes.fail_together():
                for thread in here:
                    thread.run_unit(partial(prepared, unit))


@contextmanager
def _parking(units: Sequence[nn.Module | None]) -> Iterator[None]:
    """Replace the entry point of every unit, so that batches park there."""
    with ExitStack() as restored:
        for index, unit in enumerate(units):
            if unit is None:
                continue
            entry = entry_point(unit)
            restored.enter_context(patched(unit, "_compiled_call_impl", None))  # it would bypass the entry point
            restored.enter_context(patched(unit, entry, partial(park, index, getattr(unit, entry))))
        yield


@contextmanager
def _batch_threads(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[list[BatchThread]]:
    """Construct one thread for each batch; end all threads at the end of this block."""
    state, stalled = ThreadState(), None
    ends_workers = keeps_many_workers(len(samples))
    threads = [BatchThread(sample, names, state, ends_workers) for sample in samples]
    try:
        yield threads
    except Stalled as stall:
        stalled = stall.thread
        raise UserError(_explain(stall, threads)) from None
    finally:
        # In reverse order, as contexts nest: a batch may have entered a context inside the context of the batch before.
        for thread in reversed(threads):
            if thread is not stalled:
                thread.cancel(timeout=None if stalled is None else 1)
        if stalled is not None:  # which the other batches may have kept from running
            stalled.cancel(timeout=1)


def _explain(stall: Stalled, threads: Sequence[BatchThread]) -> str:
    waiting = ", ".join(
        f"batch {each.call.sample.batch_index} at {each.call.unit}" for each in threads if each.call is not None
    )
    return (
        f"sequential must be 'none' for this model, whose batches cannot run side by side: {stall} without computing "
        "anything, perhaps for a lock that the model keeps from one unit to the next. Parked inside the model: "
        f"{waiting or 'no other batch'}. Use sequential='none', which runs one batch after the other, or let the model "
        "release the lock in each unit."
    )
