"""Run a block on parked calls before and after a change of its weights, and compare the results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.common.evaluation_mode import seeded
from wanda_lightning.core.rounding import all_same, coarsest_eps, same_columns
from wanda_lightning.core.types import Units
from wanda_lightning.models import Layer
from wanda_lightning.units.candidates import HiddenUnits


@dataclass
class _Record:
    """The results of one call of a block, and the inputs of its modules."""

    # Tensors that the block returned, or wrote into its arguments or attributes, in this order.
    results: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)  # that the block wrote into
    # Inputs of each module with a matrix, one tensor for each of its calls.
    inputs: dict[Module, list[Tensor]] = field(default_factory=dict)
    eps: float = 0.0  # largest relative rounding error of the dtypes that the block used


class BlockRuns:
    """Compares runs of a block with its first ones. The inputs of its modules are recorded for the first call only.

    Of a `whole` model, only what it returns is compared, and less strictly: rounding spreads from block to block.
    """

    def __init__(self, block: Module, calls: Sequence[Call], whole: bool = False) -> None:
        self._block = block
        self._calls = calls
        self._whole = whole
        self._matrices = [module for module in block.modules() if _has_matrix(module)]
        self._records: list[_Record] = []

    def recording(self) -> Iterator[Call]:
        """Yield the calls; the first run of each is what later runs are compared with."""
        for index, call in enumerate(self._calls):
            is_watched = index == 0 and not self._whole
            watched = self._matrices if is_watched else []
            yield replace(call, forward=partial(self._run_first, call, watched))

    def _run_first(self, call: Call, watched: Sequence[Module], *args: Any, **kwargs: Any) -> Any:
        output, record = self._run(call, args, kwargs, watched)
        self._records.append(record)
        return output

    @property
    def is_empty(self) -> bool:
        """Whether there is no call."""
        return not self._records

    def reads_alone(self, module: Module) -> bool:
        """Whether the first call reaches a module, and no other module with a matrix gets the same input."""
        inputs = dict(self._records[0].inputs)
        own_inputs = inputs.pop(module, None)
        if own_inputs is None:
            return False
        others = list(chain(*inputs.values()))
        return not any(x.shape == y.shape and torch.equal(x, y) for x in own_inputs for y in others)

    def same_results(self) -> bool:
        """Run all calls, and return whether the block gives the same results as at first, to rounding."""
        # All of them, also after a difference: equally many runs in each process.
        again = [self._run_again(index) for index in range(len(self._records))]
        return all(map(self._same_results, self._records, again))

    def same_after(
        self,
        change: Callable[[], object],
        units: HiddenUnits | None = None,
        keep: Units | None = None,
    ) -> bool:
        """Run the first call, take something out of the block, and run it again: whether it computes the same.

        If hidden `units` are taken out but those to `keep`, the call must reach their layers, and what the reader gets
        must be the same, too, since a residual stream or a small scale could hide a difference from the results. A
        block whose shapes no longer fit raises whatever its model raises; it does not compute the same.
        """
        watched = []
        if units is not None and keep is not None:
            watched = [layer.module for layer in (units.reader, *units.writers)]
            columns = keep.repeat(units.columns_per_unit)  # before there are fewer

        before = self._run_again(0, watched)
        change()
        try:
            after = self._run_again(0, watched)
        except Exception:
            return False

        # Buffers may have other shapes now.
        before.buffers = []
        after.buffers = []
        is_reached = all(module in before.inputs for module in watched)
        if not is_reached or not self._same_results(before, after):
            return False
        return units is None or _reads_same(units.reader, columns, before, after)

    def _same_results(self, before: _Record, after: _Record) -> bool:
        return all_same(
            before.results + before.buffers,
            after.results + after.buffers,
            before.eps,
            loosely=self._whole,
        )

    def _run_again(self, index: int, watched: Sequence[Module] = ()) -> _Record:
        call = self._calls[index]
        records = []

        def run(*args: Any, **kwargs: Any) -> None:
            records.append(self._run(call, args, kwargs, watched)[1])

        replace(call, forward=run).run(on_copies=True)
        return records[0]

    def _run(
        self, call: Call, args: Any, kwargs: Any, watched: Sequence[Module]
    ) -> tuple[Any, _Record]:
        """Run a call on arguments that it may change, and record the inputs of the watched modules."""
        inputs: dict[Module, list[Tensor]] = {}

        def enter(module: Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_within((args, kwargs))
            if tensors:
                inputs.setdefault(module, []).append(tensors[0].clone())

        buffers = () if self._whole else self._block.buffers()
        buffers_before = [(buffer, buffer.clone()) for buffer in buffers]
        with (
            seeded(0, device_of(self._block)),
            ExitStack() as hooks,
        ):  # some models draw numbers in evaluation, too
            for module in watched:
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            output = call.forward(*args, **kwargs)

        results = tensors_within(output)
        if not self._whole:
            # A block may pass tensors to others through an object among its arguments, or through attributes.
            results = tensors_within((output, args, kwargs))
            for module in self._block.modules():
                results += [value for value in vars(module).values() if isinstance(value, Tensor)]
        record = _Record(
            results=[tensor.clone() for tensor in results],
            buffers=[
                buffer.clone() for buffer, old in buffers_before if not torch.equal(buffer, old)
            ],
            inputs=inputs,
        )
        record.eps = coarsest_eps([*record.results, *record.buffers, *chain(*inputs.values())])
        return output, record


def device_of(module: Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a module without parameters."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _has_matrix(module: Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _reads_same(layer: Layer, columns: Tensor, before: _Record, after: _Record) -> bool:
    """Whether a layer reads the given columns of what it has read before."""
    inputs_before = before.inputs.get(layer.module, [])
    inputs_after = after.inputs.get(layer.module, [])
    if len(inputs_before) != len(inputs_after):
        return False
    for old, new in zip(inputs_before, inputs_after, strict=True):
        expected = layer.tokens(old)[:, columns.to(old.device)]
        tokens = layer.tokens(new)
        if expected.shape != tokens.shape:
            return False
        if not same_columns(expected, tokens, before.eps):
            return False
    return True
