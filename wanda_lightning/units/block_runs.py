"""Run a block on parked calls before and after a change of its weights, and compare the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.common.evaluation_mode import seeded
from wanda_lightning.core.rounding import all_same, coarsest_eps, same
from wanda_lightning.models import Layer
from wanda_lightning.units.candidates import RemovableUnits


@dataclass
class _Record:
    """The results of one call of a block, and the inputs of its modules."""

    # Tensors that the block returned, or wrote into its arguments or attributes, in this order.
    results: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)  # that the block wrote into
    # Inputs of each module with a matrix, one tensor for each of its calls.
    inputs: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    eps: float = 0.0  # largest relative rounding error of the dtypes that the block used


class BlockRuns:
    """Compares runs of a block with its first ones. The inputs of its modules are recorded for the first call only.

    Of a `whole` model, only what it returns is compared, and less strictly: rounding spreads from block to block.
    """

    def __init__(self, block: nn.Module, calls: Sequence[Call], whole: bool = False) -> None:
        self._block = block
        self._calls = calls
        self._whole = whole
        self._matrices = [
            m for m in block.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))
        ]
        self._records: list[_Record] = []

    def recording(self) -> Iterator[Call]:
        """Yield the calls; the first run of each is what later runs are compared with."""
        for index, call in enumerate(self._calls):
            watched = () if index or self._whole else self._matrices

            def run(
                *args: Any, call: Call = call, watched: Sequence[nn.Module] = watched, **kwargs: Any
            ) -> Any:
                output, record = self._run(call, args, kwargs, watched)
                self._records.append(record)
                return output

            yield replace(call, forward=run)

    @property
    def is_empty(self) -> bool:
        """Whether there is no call."""
        return not self._records

    def reaches(self, module: nn.Module) -> bool:
        """Whether the first call calls a module."""
        return module in self._records[0].inputs

    def reads_alone(self, module: nn.Module) -> bool:
        """Whether the first call reaches a module, and no other module with a matrix gets the same input."""
        inputs = self._records[0].inputs
        if not self.reaches(module):
            return False
        others = [x for other, entered in inputs.items() if other is not module for x in entered]
        return not any(
            torch.equal(x, y) for x in inputs[module] for y in others if x.shape == y.shape
        )

    def is_permuted(self, layer: Layer, source: Tensor, inner: Set[nn.Module]) -> bool:
        """Run the first call, and return whether a layer reads its inputs in another order, and nothing else changed.

        `source` is the old position of each input. The inputs of the `inner` modules may change, too.
        """
        before = self._records[0]
        after = self._run_again(0, self._matrices)
        if not self._same_results(before, after) or before.inputs.keys() != after.inputs.keys():
            return False
        others = before.inputs.keys() - {layer.module, *inner}
        unchanged = all(
            all_same(before.inputs[other], after.inputs[other], before.eps) for other in others
        )
        return unchanged and _reads_same(layer, source, before, after)

    def same_results(self) -> bool:
        """Run all calls, and return whether the block gives the same results as at first, to rounding."""
        # Equally many runs in each process.
        again = [self._run_again(index) for index in range(len(self._records))]
        return all(self._same_results(*pair) for pair in zip(self._records, again, strict=True))

    def same_after(
        self, change: Callable[[], object], read: tuple[RemovableUnits, Tensor] | None = None
    ) -> bool:
        """Run the first call, take something out of the block, and run it again: whether it computes the same.

        `read` are hidden units, and which of them stay: the call must reach their layers, and what the reader gets must
        be the same, too, since a residual stream or a small scale could hide a difference from the results. A block
        whose shapes no longer fit raises whatever its model raises; it does not compute the same.
        """
        columns = read and read[1].repeat(read[0].columns)  # before there are fewer
        watched = [layer.module for layer in (read[0].reader, *read[0].writers)] if read else []
        before = self._run_again(0, watched)
        change()
        try:
            after = self._run_again(0, watched)
        except Exception:
            return False
        before.buffers = []
        after.buffers = []  # may have other shapes now
        same = self._same_results(before, after) and all(
            module in before.inputs for module in watched
        )
        return same and (
            read is None or columns is None or _reads_same(read[0].reader, columns, before, after)
        )

    def _same_results(self, before: _Record, after: _Record) -> bool:
        results = before.results + before.buffers, after.results + after.buffers
        return all_same(*results, before.eps, loosely=self._whole)

    def _run_again(self, index: int, watched: Sequence[nn.Module] = ()) -> _Record:
        call = self._calls[index]
        records: list[_Record] = []

        def run(*args: Any, **kwargs: Any) -> None:
            records.append(self._run(call, args, kwargs, watched)[1])

        replace(call, forward=run).run(on_copies=True)
        return records[0]

    def _run(
        self, call: Call, args: Any, kwargs: Any, watched: Sequence[nn.Module]
    ) -> tuple[Any, _Record]:
        """Run a call on arguments that it may change, and record the inputs of the watched modules."""
        record = _Record()
        device = next((p.device for p in self._block.parameters()), torch.device("cpu"))
        buffers = (
            [] if self._whole else [(buffer, buffer.clone()) for buffer in self._block.buffers()]
        )

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if entered := tensors_within((args, kwargs)):
                record.inputs.setdefault(module, []).append(entered[0].clone())

        with seeded(0, device), ExitStack() as hooks:  # some models draw numbers in evaluation, too
            for module in watched:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            output = call.forward(*args, **kwargs)
        found = tensors_within(output)
        # A block may pass tensors to others through an object among its arguments.
        if not self._whole:
            attributes = (
                value for module in self._block.modules() for value in vars(module).values()
            )
            found = [
                *tensors_within((output, args, kwargs)),
                *(x for x in attributes if isinstance(x, Tensor)),
            ]
        record.results = [tensor.clone() for tensor in found]
        record.buffers = [buffer.clone() for buffer, old in buffers if not torch.equal(buffer, old)]
        record.eps = coarsest_eps(
            record.results
            + record.buffers
            + [x for entered in record.inputs.values() for x in entered]
        )
        return output, record


def _reads_same(layer: Layer, columns: Tensor, before: _Record, after: _Record) -> bool:
    """Whether a layer reads the given columns of what it has read before."""
    x, y = (
        [layer.tokens(each) for each in record.inputs.get(layer.module, ())]
        for record in (before, after)
    )
    pairs = [(old[:, columns.to(old.device)], new) for old, new in zip(x, y, strict=False)]
    return len(x) == len(y) and all(
        old.shape == new.shape and same(old, new, before.eps, each_column=True)
        for old, new in pairs
    )
