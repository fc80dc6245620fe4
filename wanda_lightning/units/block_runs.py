"""Run a block on a parked call before and after a change of its weights, and compare the results."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Record:
    """The results of a run, and what its modules read."""

    # Tensors that the block returned, or wrote into its arguments or attributes, in this order.
    results: list[Tensor]
    inputs: dict[Module, list[Tensor]]  # of each watched module, one tensor for each of its calls
    eps: float  # largest relative rounding error of the dtypes that the block used

    def reads_alone(self, module: Module) -> bool:
        """Whether the run reaches a module, and no other watched module gets the same input."""
        others = [inputs for other, inputs in self.inputs.items() if other is not module]
        return module in self.inputs and not any(
            x.shape == y.shape and torch.equal(x, y)
            for x in self.inputs[module]
            for y in chain(*others)
        )

    def reads_same(self, other: "Record", layer: Layer, columns: Tensor) -> bool:
        """Whether, in another run, a layer reads the given columns of what it reads in this one."""
        inputs = self.inputs.get(layer.module, [])
        other_inputs = other.inputs.get(layer.module, [])
        if len(inputs) != len(other_inputs):
            return False
        for old, new in zip(inputs, other_inputs, strict=True):
            expected = layer.tokens(old)[:, columns.to(old.device)]
            tokens = layer.tokens(new)
            if expected.shape != tokens.shape or not same_columns(expected, tokens, self.eps):
                return False
        return True


@dataclass(frozen=True)
class BlockRuns:
    """Runs a block on one call, as often as necessary.

    Of a `whole` model, only what it returns is compared, and less strictly: rounding spreads from block to block.
    """

    block: Module
    call: Call
    whole: bool = False

    def run(self, watched: Sequence[Module] = ()) -> Record:
        """Run the call on arguments that it may change, and record the inputs of the watched modules."""
        return replace(self.call, forward=partial(self._record, watched)).run(on_copies=True)

    def is_same(self, before: Record, after: Record) -> bool:
        """Whether two runs have the same results, to rounding."""
        return all_same(before.results, after.results, before.eps, loosely=self.whole)

    def same_after(
        self,
        change: Callable[[], object],
        units: HiddenUnits | None = None,
        keep: Units | None = None,
    ) -> bool:
        """Run the call, take something out of the block, and run it again: whether it computes the same.

        If hidden `units` are taken out but those to `keep`, the call must reach their layers, and what the reader gets
        must be the same, too, since a residual stream or a small scale could hide a difference from the results. A
        block whose shapes no longer fit raises whatever its model raises; it does not compute the same.
        """
        watched = []
        if units is not None and keep is not None:
            watched = [layer.module for layer in (units.reader, *units.writers)]
            columns = keep.repeat(units.columns_per_unit)  # before there are fewer

        before = self.run(watched)
        change()
        try:
            after = self.run(watched)
        except Exception:
            return False

        is_reached = before.inputs.keys() == set(watched)
        if not is_reached or not self.is_same(before, after):
            return False
        return units is None or before.reads_same(after, units.reader, columns)

    def _record(self, watched: Sequence[Module], *args: Any, **kwargs: Any) -> Record:
        inputs: dict[Module, list[Tensor]] = {}

        def enter(module: Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_within((args, kwargs))
            if tensors:
                inputs.setdefault(module, []).append(tensors[0].clone())

        # Some models draw numbers in evaluation, too.
        with seeded(0, device_of(self.block)), ExitStack() as hooks:
            for module in watched:
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            output = self.call.forward(*args, **kwargs)

        results = tensors_within(output)
        if not self.whole:
            # A block may pass tensors to others through an object among its arguments, or through attributes.
            results = tensors_within((output, args, kwargs))
            for module in self.block.modules():
                results += [value for value in vars(module).values() if isinstance(value, Tensor)]
        results = [tensor.clone() for tensor in results]
        return Record(results, inputs, coarsest_eps([*results, *chain(*inputs.values())]))


def device_of(module: Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a module without parameters."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
