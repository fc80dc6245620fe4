"""Load each block of a checkpoint when the model calls it, and store and free it when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch

from wanda_lightning.streaming.checkpoint import Checkpoint, Keys
from wanda_lightning.streaming.offloading import return_freed_memory
from wanda_lightning.streaming.parts import RESIDENT

_WRITES_PLACEHOLDER = "more than one element of the written-to tensor refers to a single memory location"


class BlockLoader:
    """Keeps the blocks in memory that are in use, and the one that is expected next.

    One thread in the background stores, frees and loads, one block after the other. So the next block is loaded when
    the previous one is freed, and at most two are in memory besides those that batches still need.

    Args:
        checkpoint: The model.
        stored: Returns other files that hold a block; None for those of the checkpoint.
        prepare: Called with a block that was loaded from the checkpoint.

    Attributes:
        loaded: The blocks in memory, in the order in which they were called; without the one that is expected next.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: Callable[[str], Keys | None] = lambda block: None,
        prepare: Callable[[str], None] = lambda block: None,
    ) -> None:
        self._checkpoint, self._stored, self._prepare = checkpoint, stored, prepare
        self.loaded: list[str] = []
        self._order = list(checkpoint.blocks)
        self._unvisited = list(self._order)
        self._held = RESIDENT
        self._background = ThreadPoolExecutor(1, thread_name_prefix="blocks on disk")
        self._next: tuple[str, Future[None]] | None = None
        self._freed: Future[None] | None = None  # the block that was freed last

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load each block when the model calls it; free all blocks at the end.

        Raises:
            ValueError: If the model changes weights of a block before it calls the block.
        """
        hooks = [
            self._checkpoint.model.get_submodule(block).register_forward_pre_hook(
                partial(lambda block, module, args: self.require(block), block)
            )
            for block in self._checkpoint.blocks
        ]
        try:
            yield
        except RuntimeError as error:
            if _WRITES_PLACEHOLDER in str(error):
                raise self._checkpoint.refusal("it changes weights of a block before it calls the block") from error
            raise
        finally:
            for hook in hooks:
                hook.remove()
            self._background.shutdown(cancel_futures=True)
            for block in self._checkpoint.blocks:
                self._checkpoint.unload(block)
            self.loaded.clear()

    def hold(self, block: str) -> None:
        """Have a block in memory, and no other one except the next."""
        if block == self._held:
            return
        if not self._unvisited and block not in self.loaded:  # a backward pass begins
            self._order.reverse()
            self._unvisited = [other for other in self._order if other not in (block, self._held)]
        for other in [other for other in self.loaded if other != block]:
            self.free(other)
        self.require(block)
        self.expect_next(block)
        self._held = block

    def start_again(self) -> None:
        """Free all blocks, for another pass through the model."""
        self.expect_nothing()
        for block in list(self.loaded):
            self.free(block)
        self._order, self._held = list(self._checkpoint.blocks), RESIDENT
        self._unvisited = list(self._order)

    def require(self, block: str) -> None:
        """Have a block in memory.

        Raises:
            OSError: If it cannot be read, or the block before could not be stored.
        """
        if block in self.loaded:
            return
        self.finish()  # the background thread stores before it loads, so this takes no time
        if not self._arrived(block):
            self._submit(self._load, block).result()
        self.loaded.append(block)
        if block in self._unvisited:
            self._unvisited.remove(block)

    def expect_next(self, block: str) -> None:
        """Begin to load, in the background, the block that is probably called after this one."""
        order = self._order.index
        following = sorted(self._unvisited, key=lambda other: (order(other) < order(block), order(other)))
        if self._next is None and following:
            self._next = following[0], self._submit(self._load, following[0])

    def expect_nothing(self) -> None:
        """Free the block that was expected next."""
        self._arrived(RESIDENT)

    def free(self, block: str, store: Callable[[], object] = lambda: None) -> None:
        """Store a block and free it, in the background.

        Raises:
            OSError: If the block before could not be stored.
        """
        self.finish()
        self.loaded.remove(block)
        self._freed = self._submit(self._free, block, store)

    def finish(self) -> None:
        """Wait until all blocks are stored.

        Raises:
            OSError: If one could not be stored.
        """
        if self._freed is not None:
            freed, self._freed = self._freed, None
            freed.result()

    def _submit(self, step: Callable[..., None], *args: object) -> Future[None]:
        return self._background.submit(torch.no_grad()(step), *args)

    def _load(self, block: str) -> None:
        stored = self._stored(block)
        self._checkpoint.load(block, stored)
        if stored is None:
            self._prepare(block)

    def _free(self, block: str, store: Callable[[], object]) -> None:
        store()
        self._checkpoint.unload(block)
        return_freed_memory()  # up to twice the block would stay in memory

    def _arrived(self, wanted: str) -> bool:
        """Wait for the block that was expected, and return whether it is the wanted one; free any other."""
        if self._next is None:
            return False
        block, future = self._next
        self._next = None
        future.result()
        if block != wanted:
            self._submit(self._checkpoint.unload, block).result()
        return block == wanted
