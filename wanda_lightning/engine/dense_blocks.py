"""Run a few samples through the dense model, and stop at each block before anything is pruned."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.weight_memory import weights_moved
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.engine.run import Run
from wanda_lightning.models import Unit
from wanda_lightning.parallel import fsdp_calls_checked


def dense_blocks(
    run: Run, blocks: Sequence[Unit], count: int, title: str, again: set[str]
) -> Generator[tuple[Unit, Sequence[Call]]]:
    """Yield each block, whose weights are in memory then, with the calls of the samples that wait at it.

    The samples are the first `count` of all processes together. After the last block, `again` receives the names of
    those that a sample of any process has reached more than once: the later calls may use a block in another way.
    """
    store, processes, revisited = run.store, run.plan.processes, set[int]()
    samples = run.samples.head(count)
    if not any(number for (number,) in processes.all_gather([len(samples)])):
        run.samples.refuse_if_empty()
    modules, names = [block.module for block in blocks], [block.name for block in blocks]
    with (
        ProgressBar(title, len(blocks), run.progress) as bar,
        store.dense(),
        fsdp_calls_checked(run.plan.model, processes, weights_moved) as check_calls,
    ):
        for stop in lockstep(samples, modules, names, processes, revisited):
            block = blocks[stop.unit]
            check_calls(block.name, len(stop.calls))
            bar.show(block.name)
            store.hold(block.name)
            yield block, stop.calls
            bar.advance()
    # Only processes with samples there have seen it.
    again |= {name for index, name in enumerate(names) if not processes.all_agree(index not in revisited)}
