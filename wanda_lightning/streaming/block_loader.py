"""Load each block of a checkpoint when the model calls it, and store and free it when it is done."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import torch

from wanda_lightning.streaming.checkpoint import Checkpoint, Keys

_WRITES_PLACEHOLDER = "more than one element of the written-to tensor refers to a single memory location"


class BlockLoader:
    """Keeps the blocks in memory that are in use, and the prefetched one.

    One background thread stores, frees and loads one block after the other, so the next block is loaded when the
    previous one is freed: at most two are in memory besides those that batches still need. `stored` returns the files
    of a block that was written, or None to load it from the checkpoint and to call `prepare` with it. Methods that load
    or evict raise an OSError if a block cannot be read, or if the block evicted before could not be stored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: Callable[[str], Keys | None] = lambda block: None,
        prepare: Callable[[str], None] = lambda block: None,
    ) -> None:
        self._checkpoint, self._stored, self._prepare = checkpoint, stored, prepare
        self.loaded: list[str] = []  # in the order in which they were called, without the prefetched one
        self._background = ThreadPoolExecutor(1, thread_name_prefix="blocks on disk")
        self._prefetched: tuple[str, Future[None]] | None = None
        self._evicted: Future[None] | None = None  # the latest eviction
        self._place, self._step = -1, 1  # index of the latest block, and the direction of the pass

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load each block when the model calls it; free all blocks at the end."""
        hooks = [
            self._checkpoint.model.get_submodule(block).register_forward_pre_hook(
                partial(lambda block, module, args: self.load(block), block)
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

    def load(self, block: str) -> None:
        """Load a block unless it is in memory."""
        if block in self.loaded:
            return
        self.wait()  # the background thread stores before it loads, so this takes no time
        if not self._take_prefetched(block):
            self._submit(self._load, block).result()
        self.loaded.append(block)

    def load_only(self, block: str) -> None:
        """Load a block; evict all others except the prefetched one."""
        if self._checkpoint.blocks.index(block) == self._place:  # batches may already have called the next block
            return
        for other in [other for other in self.loaded if other != block]:
            self.evict(other)
        self.load(block)
        self.prefetch_after(block)

    def prefetch_after(self, block: str) -> None:
        """Start loading the block that follows in the direction of the pass, forward or backward."""
        blocks, place = self._checkpoint.blocks, self._checkpoint.blocks.index(block)
        if place != self._place:
            self._place, self._step = place, 1 if place > self._place else -1
        following = place + self._step
        if self._prefetched is None and 0 <= following < len(blocks) and blocks[following] not in self.loaded:
            self._prefetched = blocks[following], self._submit(self._load, blocks[following])

    def drop_prefetched(self) -> None:
        """Free the prefetched block."""
        self._take_prefetched("")

    def evict(self, block: str, store: Callable[[], object] = lambda: None) -> None:
        """Store a block and free it, in the background."""
        self.wait()
        self.loaded.remove(block)
        self._evicted = self._submit(self._evict, block, store)

    def wait(self) -> None:
        """Wait until all evicted blocks are stored."""
        if self._evicted is not None:
            evicted, self._evicted = self._evicted, None
            evicted.result()

    def reset(self) -> None:
        """Free all blocks, for another pass through the model."""
        self.drop_prefetched()
        for block in list(self.loaded):
            self.evict(block)
        self._place, self._step = -1, 1

    def _submit(self, step: Callable[..., None], *args: object) -> Future[None]:
        return self._background.submit(torch.no_grad()(step), *args)

    def _load(self, block: str) -> None:
        stored = self._stored(block)
        self._checkpoint.load(block, stored)
        if stored is None:
            self._prepare(block)

    def _evict(self, block: str, store: Callable[[], object]) -> None:
        store()
        self._checkpoint.unload(block)
        _return_freed_memory()

    def _take_prefetched(self, wanted: str) -> bool:
        """Wait for the prefetched block, and return whether it is the wanted one; free any other."""
        if self._prefetched is None:
            return False
        (block, future), self._prefetched = self._prefetched, None
        future.result()
        if block != wanted:
            self._submit(self._checkpoint.unload, block).result()
        return block == wanted


def _return_freed_memory() -> None:
    """Return freed memory to the operating system: glibc would keep up to twice the block."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
