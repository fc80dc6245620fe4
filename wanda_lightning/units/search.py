"""Find the hidden units of a layer by running its block.

Candidates come from shapes (`candidates.py`). The units of each are changed, and the block runs again: what it computes
shows which candidate is right.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from torch.nn import Module

from wanda_lightning.calibration.lockstep import Visit, lockstep
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Layer, Stop, tied_tensors
from wanda_lightning.models.layers import named_modules
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.run import Run
from wanda_lightning.units.block_runs import BlockRuns
from wanda_lightning.units.candidates import HiddenUnits

_NONE_IS_RIGHT = -1


def visit_dense_blocks(
    run: Run, blocks: Sequence[Stop], count: int, title: str, visit_block: Callable[[Visit], None]
) -> set[str]:
    """Call `visit_block` at each block, whose dense weights are in memory then.

    The samples are the first `count` of all processes together.

    Returns:
        Names of the blocks that a sample of any process has reached after their visit. Such a call may use a block in
        another way.
    """
    processes = run.plan.processes
    samples = run.samples.first_samples(count)
    if not any(number for (number,) in processes.all_gather([len(samples)])):
        run.samples.refuse_if_empty()

    with (
        ProgressBar(title, len(blocks), run.progress) as bar,
        closing(lockstep(blocks, samples, processes, model=run.plan.model)) as visits,
    ):
        for visit in run.store.dense_visits(visits):
            bar.show(visit.stop.name)
            visit_block(visit)
            bar.advance()

    # Only processes with samples there have seen it.
    passed = visits.passed.by_any()
    return {block.name for block in blocks if not processes.all_agree(block.name not in passed)}


class UnitSearch:
    """Finds the hidden units of one block after the other."""

    def __init__(self, plan: Plan, likeness: Callable[[Module], object]) -> None:
        self._plan = plan
        self._likeness = likeness  # equal for blocks in which the same candidate is right
        self._modules = named_modules(plan.model)
        self._tied = tied_tensors(plan.model)
        # Index of the right candidate for readers with the same name and shape in blocks alike.
        self._right_candidates: dict[tuple[object, ...], int] = {}

    def first_right(
        self,
        reader: Layer,
        block: Stop,
        runs: BlockRuns,
        candidates: Callable[[Layer, Module, Module], Iterator[HiddenUnits]],
        is_right: Callable[[HiddenUnits, BlockRuns], bool | None],
    ) -> HiddenUnits | None:
        """Return the hidden units of a reader: the first candidate that is right, if any.

        For a candidate that may be right in a later block, `is_right` returns None.
        """
        assert block.module is not None
        if not self._plan.processes.all_agree(runs.is_empty or runs.reads_alone(reader.module)):
            return None

        parent = self._modules[reader.name.rpartition(".")[0]]
        name_in_block = reader.name.removeprefix(block.name)
        key = (self._likeness(block.module), name_in_block, reader.shape)
        known = self._right_candidates.get(key)
        is_undecided = False
        for index, units in enumerate(candidates(reader, parent, block.module)):
            if known is not None and known != index:
                continue
            right = is_right(units, runs)
            if right:
                self._right_candidates[key] = index
                return units
            if right is None:
                is_undecided = True
        if not is_undecided:
            self._right_candidates.setdefault(key, _NONE_IS_RIGHT)
        return None

    def is_tied(self, units: HiddenUnits) -> bool:
        """Whether a tensor of the units shares its memory with another one."""
        return any((slot.module, slot.name) in self._tied for slot in units.slots)
