"""Load each block of a model when the batches arrive at it, and store it when they have left it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from wanda_lightning.models import Unit
from wanda_lightning.notes import Outcome
from wanda_lightning.refusals import refuse_unprunable
from wanda_lightning.report import read_layer, read_skipped
from wanda_lightning.streaming.checkpoint import RESIDENT, Checkpoint
from wanda_lightning.streaming.output import OutputFolder
from wanda_lightning.weight_store import WeightStore


class StreamedWeights(WeightStore):
    """At most three blocks are in memory: the one that is pruned, the next, and one that a batch still uses.

    Args:
        checkpoint: The model.
        output: Where its parts are written.
    """

    is_whole = False
    advice = "What is written stays: start again with the same choices to continue."

    def __init__(self, checkpoint: Checkpoint, output: OutputFolder) -> None:
        self._checkpoint, self._output = checkpoint, output
        self._loaded: list[str] = []
        self._unvisited = list(checkpoint.blocks)
        self._layers: dict[str, list[Any]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="next block")
        self._next: tuple[str, Future[None]] | None = None

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Load each block when it is called, for the duration of this block."""
        hooks = [
            self._checkpoint.model.get_submodule(block).register_forward_pre_hook(partial(self._on_call, block))
            for block in self._checkpoint.blocks
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._loader.shutdown(cancel_futures=True)

    def _on_call(self, block: str, module: object, args: object) -> None:
        self._require(block)

    def arrive(self, unit: Unit, outcome: Outcome) -> bool:
        """Store the blocks that all batches have left, and load the unit's block and the next one."""
        part = self._checkpoint.part_of(f"{unit.name}.")
        self._layers = self._layers or self._layers_by_part(outcome)
        for block in [block for block in self._loaded if block != part]:
            self._store(block, outcome)
        if part == RESIDENT:
            return False
        self._require(part)
        self._load_next(part)
        if part not in self._output.written:
            return False
        self._recall(part, outcome)
        return True

    def finish(self, outcome: Outcome) -> None:
        """Store all parts that are not stored yet."""
        self._layers = self._layers or self._layers_by_part(outcome)
        self._drop_next()
        for block in self._checkpoint.blocks:
            if block in self._loaded or block not in self._output.written:
                self._require(block)
                self._store(block, outcome)
        self._write(RESIDENT, outcome)

    @property
    def zeros(self) -> int:  # type: ignore[override]
        """Number of zeros in the stored blocks."""
        return sum(record["zeros"] for part, record in self._output.written.items() if part != RESIDENT)

    def _layers_by_part(self, outcome: Outcome) -> dict[str, list[Any]]:
        layers: dict[str, list[Any]] = {part: [] for part in (RESIDENT, *self._checkpoint.blocks)}
        for layer in outcome.plan.layers:
            layers[self._checkpoint.part_of(layer.name)].append(layer)
        return layers

    def _require(self, block: str) -> None:
        """Have a block in memory."""
        if block in self._loaded:
            return
        if self._drop_next(unless=block) is None:
            self._load(block)
        self._loaded.append(block)
        if block in self._unvisited:
            self._unvisited.remove(block)
        if block not in self._output.written:
            with torch.inference_mode(False), torch.no_grad():
                refuse_unprunable(self._layers.get(block, ()))

    def _load(self, block: str) -> None:
        stored = self._output.stored(block) if block in self._output.written else None
        self._checkpoint.load(block, stored)

    def _load_next(self, block: str) -> None:
        """Begin to load in the background the block that the batches will probably reach next."""
        order = self._checkpoint.blocks.index
        following = sorted(self._unvisited, key=lambda other: (order(other) < order(block), order(other)))
        if self._next is None and following:
            self._next = following[0], self._loader.submit(self._load, following[0])

    def _drop_next(self, unless: str = "") -> str | None:
        """Wait for the block that is being loaded, and free it unless it is this one; return it if it is."""
        if self._next is None:
            return None
        block, future = self._next
        self._next = None
        future.result()
        if block == unless:
            return block
        self._checkpoint.unload(block)
        return None

    def _store(self, block: str, outcome: Outcome) -> None:
        """Write a block unless it is written already, and free it."""
        if block not in self._output.written:
            self._write(block, outcome)
        self._checkpoint.unload(block)
        self._loaded.remove(block)

    def _write(self, part: str, outcome: Outcome) -> None:
        names = {layer.name for layer in self._layers[part]}
        tensors = self._checkpoint.stored(part)
        model: Any = self._checkpoint.model
        zeros = sum(
            int((parameter == 0).count_nonzero())
            for name, parameter in model.named_parameters()
            if self._checkpoint.part_of(name) == part
        )
        record = {
            "layers": [asdict(layer) for name, layer in outcome.layers.items() if name in names],
            "skipped": [asdict(matrix) for name, matrix in outcome.skipped.items() if name in names],
            "few_tokens": {name: tokens for name, tokens in outcome.few_tokens.items() if name in names},
            "zeros": zeros,
        }
        self._output.save(part, tensors, record)

    def _recall(self, part: str, outcome: Outcome) -> None:
        """Copy what an earlier run did to a part into the outcome."""
        record = self._output.written[part]
        for fields in record["layers"]:
            outcome.layers[fields["name"]] = read_layer(fields)
        for fields in record["skipped"]:
            outcome.skipped[fields["name"]] = read_skipped(fields)
        outcome.few_tokens = {**outcome.few_tokens, **record["few_tokens"]}
