"""Take out the hidden units that are zero on both sides: the inverse of pruning with `pattern="structured"`.

No calibration data is needed. Candidates come from shapes and zeros, and each must leave what the model computes as it
was: it runs on a small batch before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import counted
from wanda_lightning.models import Layer, RemovableUnits, adapted_module, find_layers, removable_units, tied_tensors
from wanda_lightning.models.layers import refuse_no_values
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.parallel import is_sharded
from wanda_lightning.shrinking.configuration import fit_configuration
from wanda_lightning.shrinking.trial import Trial


@dataclass
class Shrunk:
    """The result of `shrink`: what was taken out, and what stays."""

    layers: dict[str, tuple[int, int]] = field(default_factory=dict)  # by reader: its units before and after
    unproven: int = 0  # units that stay, since the model did not compute the same without them
    parameters: tuple[int, int] = (0, 0)  # before and after
    misfit: str = ""  # why no ordinary configuration describes the smaller model

    @property
    def units(self) -> int:
        """Number of units that were taken out."""
        return sum(before - after for before, after in self.layers.values())

    def refuse_nothing(self) -> None:
        """Raise an error if nothing was taken out, although a smaller model is to be saved."""
        if not self.layers:
            raise UserError(f"shrink must remove something. {self} Prune with the pattern 'structured' first.")

    def __str__(self) -> str:
        """Return the result in sentences."""
        text = "Nothing can be removed: no hidden unit is zero on both sides."
        if self.layers:
            before, after = self.parameters
            text = (
                f"Took out {self.units:,} of {sum(b for b, _ in self.layers.values()):,} hidden units in "
                f"{counted(len(self.layers), 'layer')}; {after:,} of {before:,} parameters are left."
            )
        if self.unproven:
            text += (
                f" {counted(self.unproven, 'unit stays', 'units stay')}, zero on both sides: the batch did not "
                "reach the layers, or the model did not compute the same without them."
            )
        if self.misfit:
            text += f" A saved folder loads with trust_remote_code=True only, because {self.misfit}."
        return text


def shrink(model: nn.Module, batch: Any = None, forward: Callable[[Any], object] | None = None) -> Shrunk:
    """Take out, in place, the hidden units that are zero on both sides, as `pattern="structured"` leaves them.

    The model computes the same, to rounding, with fewer parameters; this is checked with one batch for each layer.
    Units that are zero on one side only, for example since training has changed them, stay. The configuration of a
    model of transformers is adapted. Optimizers and adapters of the model with zeros do not fit afterwards.

    Args:
        model: The model, in memory and not sharded.
        batch: Runs through the model; by default a small one is made for models of transformers and timm. Its values
            matter little, but it must reach every layer that is to become smaller.
        forward: Runs the batch through the model. The default is `model(**batch)` for a mapping, `model(batch[0])` for
            a tuple or list, and `model(batch)` for a tensor.

    Returns:
        What was taken out; its `str` says so in words.

    Raises:
        ValueError: If the model has adapters, is sharded, or cannot run on the batch. It is unchanged then.
    """
    with ExitStack() as undo:
        result = _take_out(undo, model, batch, forward)
        undo.pop_all()
    return result


@contextmanager
def shrunk(model: nn.Module, batch: Any = None) -> Iterator[Shrunk]:
    """Shrink a model in this block, and put the zeros back at its end. Refuses a model without units to remove."""
    with ExitStack() as undo:
        result = _take_out(undo, model, batch, None)
        result.refuse_nothing()
        yield result


def _take_out(undo: ExitStack, model: nn.Module, batch: Any, forward: Callable[[Any], object] | None) -> Shrunk:
    if is_sharded(model):
        raise UserError(
            "shrink needs whole layers, but the model is sharded. Shrink it in one process, after training."
        )
    if (adapted := adapted_module(model)) is not None:
        raise UserError(
            f"shrink would break adapters, which were trained for the present widths, such as that of {adapted}. "
            "Merge them first (CausalLMModule.merge(), or wanda_lightning.lora.merge(model))."
        )
    before = sum(parameter.numel() for parameter in model.parameters())
    trial = Trial(model, batch, forward)
    search = _Search(model, trial, undo)
    result = search.result
    with torch.no_grad():
        # A layer outside of all blocks has the model around it.
        layers = [
            (layer, model if unit.module is layer.module else unit.module or model)
            for unit in find_layers(model).units
            for layer in unit.layers
        ]
        for layer, _ in layers:
            refuse_no_values(layer)
        for layer, block in layers:
            search.take_out(layer, block)
        if not trial.ends_same():
            raise UserError(
                "shrink must not change what the model computes, but without its zero units its outputs on the batch "
                "differ. Nothing was removed. Give a batch of real data with batch=, or keep the zeros."
            )
        result.unproven = sum(search.stay(layer, block) for layer, block in layers)
    if result.layers:
        result.misfit, put_back = fit_configuration(model, trial.ends_same)
        undo.callback(put_back)
    result.parameters = before, sum(parameter.numel() for parameter in model.parameters())
    return result


class _Search:
    """Takes out the units that one layer after the other reads."""

    def __init__(self, model: nn.Module, trial: Trial, undo: ExitStack) -> None:
        self.result = Shrunk()
        self._trial, self._undo, self._modules, self._tied = trial, undo, named_modules(model), tied_tensors(model)
        self._zeros: dict[tuple[object, ...], Tensor] = {}  # by slot
        self._taken: set[tuple[nn.Module, str, int]] = set()  # a matrix has one set of rows and one of columns

    def take_out(self, reader: Layer, block: nn.Module) -> None:
        """Take out the units that a layer reads and that are zero on both sides."""
        is_started = False
        for units, empty in self._candidates(reader, block):
            if empty.all():
                empty[0] = False  # a layer without inputs is no layer
            if not is_started:
                self._trial.start(units)
            is_started = True
            with ExitStack() as undo:
                undo.callback(units.take(~empty))
                if not self._trial.is_same(units):
                    continue
                self._undo.enter_context(undo.pop_all())
            self.result.layers[reader.name] = units.width, int((~empty).sum())
            self._taken |= units.lines
            changed = {slot.module for slot in units.slots}
            self._zeros = {key: value for key, value in self._zeros.items() if key[0] not in changed}
            return

    def stay(self, reader: Layer, block: nn.Module) -> int:
        """Return how many units that a layer reads stay although they are zero on both sides."""
        return next((int(empty.sum()) for _, empty in self._candidates(reader, block)), 0)

    def _candidates(self, reader: Layer, block: nn.Module) -> Iterator[tuple[RemovableUnits, Tensor]]:
        """Yield candidates, and which of their units are zero on both sides."""
        if reader.expert is not None or reader.width < 2:  # a layer keeps one unit
            return
        parent = self._modules[reader.name.rpartition(".")[0]]
        for units in removable_units(reader, parent, block):
            tied = any((slot.module, slot.name) in self._tied for slot in units.slots)
            if tied or self._taken & units.lines:
                continue
            for slot in units.sides:
                if slot.key not in self._zeros:
                    self._zeros[slot.key] = slot.zeros()
            empty = torch.stack([self._zeros[slot.key] for slot in units.sides]).all(dim=0)
            if empty.any():
                yield units, empty
