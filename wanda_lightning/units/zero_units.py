"""Take out the hidden units that are zero on both sides.

No calibration data is needed. Candidates come from shapes and zeros, and each must leave what its block computes as it
was: the block runs on a small batch before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import to_device
from wanda_lightning.calibration.lockstep import lockstep, whole_model_calls
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import Sample, forward_batch
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluation_mode import one_thread
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.text_features import reads_texts, text_features
from wanda_lightning.common.wording import quantity
from wanda_lightning.models import (
    Layer,
    Stop,
    adapted_module,
    find_layers,
    number_of_parameters,
    reads_images,
    tied_tensors,
)
from wanda_lightning.parallel import is_sharded
from wanda_lightning.report import PrunedLayer, PruningReport
from wanda_lightning.units.block_runs import BlockRuns, device_of
from wanda_lightning.units.candidates import HiddenUnits, removable_units
from wanda_lightning.units.fit_configuration import fit_configuration

_TEXTS = ("A short sentence.", "Another sentence, which is a little longer than the first.")


@dataclass
class Shrunk:
    """The hidden units that were taken out, and what stays."""

    layers: dict[str, PrunedLayer] = field(default_factory=dict)  # those that read units which left
    taken: int = 0  # units that were taken out of these layers
    units: int = 0  # units that these layers had
    unproven: int = 0  # units that stay, since the model did not compute the same without them
    parameters: tuple[int, int] = (0, 0)  # before and after
    misfit: str = ""  # why no ordinary configuration describes the smaller model
    note: str = ""  # on what else is different in a saved folder

    def __str__(self) -> str:
        """Return the result in sentences."""
        text = "Nothing can be removed: no hidden unit is zero on both sides."
        if self.layers:
            before, after = self.parameters
            text = (
                f"Took out {self.taken:,} of {self.units:,} hidden units in "
                f"{quantity(len(self.layers), 'layer')}; {after:,} of {before:,} parameters are left."
            )
        return " ".join((text, *self.notes()))

    def notes(self) -> Iterator[str]:
        """Yield what a user should know."""
        if self.unproven:
            yield (
                f"{quantity(self.unproven, 'unit stays', 'units stay')}, zero on both sides: the batch did not "
                "reach the layers, or the model did not compute the same without them."
            )
        if self.misfit:
            yield (
                f"A saved folder loads with trust_remote_code=True only, because {self.misfit}. Programs with their "
                "own code for the family, such as MLX and llama.cpp, need one width that the configuration says: for "
                "them, shrink with by='equal'."
            )
        if self.note:
            yield f"{self.note}."

    def report(self, seconds: float) -> PruningReport:
        """Return the report of a model out of which only units that were zero have left."""
        before, after = self.parameters
        return PruningReport(
            layers=tuple(self.layers.values()),
            skipped=(),
            parameters=before,
            zeros=before - after,
            seconds={"shrink": seconds},
            config={"preset": "", "pattern": {"name": "Structured"}},
            notes=(str(self),),
            shrunk=True,
        )


def take_out_zero_units(
    model: nn.Module, forward: Callable[[], object] | None, progress: bool = True
) -> Shrunk:
    """Take out, in place, the hidden units that are zero on both sides.

    The model computes the same, to rounding, with fewer parameters; this is checked with one batch for each layer.
    Units that are zero on one side only, for example since training has changed them, stay. The configuration of a
    model of transformers is adapted. Optimizers and adapters of the model with zeros do not fit afterwards.

    Args:
        model: The model, in memory and not sharded.
        forward: Runs a batch through the model; by default a small one is made for models of transformers, timm and
            sentence-transformers. It must reach every layer that is to become smaller.
        progress: Show a bar.

    Raises:
        ValueError: If the model has adapters, is sharded, or cannot run on the batch. It is unchanged then.
    """
    refuse_parts_of_layers(model)
    before = number_of_parameters(model)
    with ExitStack() as undo:
        search = _EmptyUnits(model, undo)
        if search.finds_any():
            # A batch of the caller may be large.
            threads = one_thread() if forward is None else nullcontext()
            if forward is None:
                forward = partial(forward_batch, model, example_batch(model))
            with threads, ProgressBar("Shrinking", len(search.blocks), progress) as bar:
                _take_out_of_model(search, model, forward, bar)
        undo.pop_all()
    search.result.parameters = before, number_of_parameters(model)
    return search.result


def refuse_parts_of_layers(model: nn.Module) -> None:
    """Refuse a model whose layers are sharded, or have adapters."""
    if is_sharded(model):
        raise UserError(
            "shrink needs whole layers, but the model is sharded. Shrink it before, or later in one process."
        )
    if (adapted := adapted_module(model)) is not None:
        raise UserError(
            f"shrink would break adapters, such as that of {adapted}. Merge them first (lora.merge(model))."
        )


def _take_out_of_model(
    search: _EmptyUnits, model: nn.Module, forward: Callable[[], object], bar: ProgressBar
) -> None:
    """Take all empty units out, and adapt the configuration; refuse a model that then computes something else."""
    sample = Sample(forward, forward)
    with pruning_mode(model):
        (call,) = whole_model_calls([sample])
        whole = BlockRuns(model, call, whole=True)
        dense = whole.run()
        with closing(lockstep(search.blocks, [sample], model=model)) as visits:
            for block, (call,) in visits:
                assert block.module is not None
                bar.show(block.name)
                search.take_out(block, BlockRuns(block.module, call))
                bar.advance()
        search.take_out(search.rest, whole)

    def is_same() -> bool:
        with pruning_mode(model):
            return whole.is_same(dense, whole.run())

    bar.show("whole model")
    if not is_same():
        raise UserError(
            "shrink must not change what the model computes, but without its zero units its outputs on the batch "
            "differ. Nothing was removed. Give a batch of real data, or keep the zeros."
        )
    search.result.unproven = search.count_left()
    if search.result.layers:
        bar.show("configuration")
        search.result.misfit, put_back = fit_configuration(model, is_same)
        search.undo.callback(put_back)


class _EmptyUnits:
    """Takes out the units of one block after the other."""

    def __init__(self, model: nn.Module, undo: ExitStack) -> None:
        self.result = Shrunk()
        self.undo = undo
        stops = find_layers(model).stops
        self.blocks = [stop for stop in stops if stop.is_block]
        others = [stop.layers for stop in stops if not stop.is_block]
        # The layers outside of these blocks, with the model around them.
        self.rest = Stop("", model, tuple(chain(*others)))
        self._tied = tied_tensors(model)

    def take_out(self, block: Stop, runs: BlockRuns) -> None:
        """Take out the units that layers of a block read and that are zero on both sides."""
        for reader in block.layers:
            for units, empty in self._candidates(reader, block):
                if empty.all():
                    empty[0] = False  # a layer without inputs is no layer
                shape = reader.shape
                if self._take_if_same(units, empty, runs):
                    taken = int(empty.sum())
                    share = taken / units.width
                    self.result.taken += taken
                    self.result.units += units.width
                    self.result.layers[reader.name] = PrunedLayer(
                        name=reader.name,
                        shape=shape,
                        target=share,
                        sparsity=share,
                        tokens=0,
                        note=f"{taken:,} of {units.width:,} hidden units were taken out",
                    )
                    break

    def _take_if_same(self, units: HiddenUnits, empty: Tensor, runs: BlockRuns) -> bool:
        """Take units out; put them back and return False if the block then computes something else."""
        with ExitStack() as undo:
            # `take` changes the block at once and returns its undo; on success the search keeps it.
            if not runs.same_after(lambda: undo.callback(units.take(~empty)), units, ~empty):
                return False
            self.undo.enter_context(undo.pop_all())
        return True

    def finds_any(self) -> bool:
        """Whether any layer has a candidate."""
        return any(self._first_candidates())

    def count_left(self) -> int:
        """Return how many units stay although they are zero on both sides."""
        left = [
            int(empty.sum())
            for reader, empty in self._first_candidates()
            if reader.name not in self.result.layers
        ]
        return sum(left)

    def _first_candidates(self) -> Iterator[tuple[Layer, Tensor]]:
        """Yield the layers that have candidates, each with the zero units of its first one."""
        for block in (*self.blocks, self.rest):
            for reader in block.layers:
                for _, empty in self._candidates(reader, block):
                    yield reader, empty
                    break

    def _candidates(self, reader: Layer, block: Stop) -> Iterator[tuple[HiddenUnits, Tensor]]:
        """Yield candidates, and which of their units are zero on both sides."""
        if reader.expert is not None or reader.width < 2:  # a layer keeps one unit
            return
        assert block.module is not None
        for units in removable_units(reader, block.module):
            *others, reader_side = units.sides
            empty = reader_side.zeros()
            if not empty.any():
                return  # nor in any other candidate
            if any((slot.module, slot.name) in self._tied for slot in units.slots):
                continue
            for side in others:
                empty &= side.zeros()
            if empty.any():
                yield units, empty


def example_batch(model: nn.Module) -> Any:
    """Return a small batch for a model of transformers, timm or sentence-transformers; refuse any other."""
    if reads_texts(model):
        return to_device(text_features(model, _TEXTS), device_of(model))
    config: Any = getattr(model, "config", None)
    if hasattr(model, "dummy_inputs") and config is not None:
        return _transformers_batch(model, config)
    settings: Any = getattr(model, "pretrained_cfg", None)
    if not settings or not settings.get("input_size"):
        raise UserError(
            f"shrink compares runs of a batch, but cannot make one for a {type(model).__name__}. Give batches, and "
            "forward= if model(batch) is not the way to run one."
        )

    channels, *size = settings["input_size"]
    sizes = [getattr(module, "img_size", None) for module in model.modules()]
    size = next((built for built in sizes if isinstance(built, tuple)), size)
    # Built with `in_chans`; a multiple of the channels may be whole pixels that the model puts side by side first.
    stem = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels)
    return _noise(model, stem if stem % channels else channels, *size)


def _transformers_batch(model: Any, config: Any) -> dict[str, Tensor]:
    if not reads_images(model):
        return to_device(model.dummy_inputs, device_of(model))
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    if not isinstance(size, list | tuple):
        size = (size, size)
    return {"pixel_values": _noise(model, getattr(config, "num_channels", 3), *size)}


def _noise(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *shape, generator=generator, dtype=torch.float32)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return noise.to(device_of(model), dtype)
