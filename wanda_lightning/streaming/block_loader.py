"""Load each block of a checkpoint when the model calls it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch

from wanda_lightning.streaming.checkpoint import Checkpoint, Keys

_WRITES_PLACEHOLDER = "more than one element of the written-to tensor refers to a single memory location"


class BlockLoader:
    """Keeps the blocks in memory that are in use.

    `stored` returns the files of a block that was written, or None to load it from the checkpoint and to call `prepare`
    with it. Loading raises an OSError if a block cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: Callable[[str], Keys | None] = lambda block: None,
        prepare: Callable[[str], None] = lambda block: None,
    ) -> None:
        self._checkpoint, self._stored, self._prepare = checkpoint, stored, prepare
        self.loaded: list[str] = []  # in the order in which they were called
        self._latest = ""  # of the calls of `load_only`

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load each block when the model calls it; free all blocks at the end."""
        with ExitStack() as stack:
            stack.callback(self.reset)
            for block in self._checkpoint.blocks:
                load = partial(lambda block, module, args: self.load(block), block)
                hook = self._checkpoint.model.get_submodule(block).register_forward_pre_hook(load)
                stack.callback(hook.remove)
            try:
                yield
            except RuntimeError as error:
                if _WRITES_PLACEHOLDER in str(error):
                    raise self._checkpoint.refusal("it changes weights of a block before it calls the block") from error
                raise

    @torch.no_grad()
    def load(self, block: str) -> None:
        """Load a block unless it is in memory."""
        if block in self.loaded:
            return
        stored = self._stored(block)
        self._checkpoint.load(block, stored)
        if stored is None:
            self._prepare(block)
        self.loaded.append(block)

    def load_only(self, block: str) -> None:
        """Load a block, and free all others."""
        if block == self._latest:  # batches may already have called the next block
            return
        for other in [other for other in self.loaded if other != block]:
            self.free(other)
        self.load(block)
        self._latest = block

    def free(self, block: str) -> None:
        """Free a block, and return its memory to the operating system: glibc would keep up to twice the block."""
        self.loaded.remove(block)
        self._checkpoint.unload(block)
        with suppress(OSError, AttributeError, TypeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

    def reset(self) -> None:
        """Free all blocks, for another pass through the model."""
        for block in [*self.loaded]:
            self.free(block)
        self._latest = ""
