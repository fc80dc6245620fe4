"""A dataloader that continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader[Any]):
    """A dataloader without workers whose position Lightning stores in checkpoints, so that no batch comes twice.

    `limit` is the Trainer's `limit_train_batches`: the number or fraction of batches after which an epoch ends.
    """

    _skip = _done = 0
    _order: Any = None  # state of the generator before it shuffled this epoch

    def __init__(self, *args: Any, limit: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit  # public: Lightning rebuilds the loader from its attributes to add a DistributedSampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, or those that are left of it."""
        skip, self._skip, self._done = self._skip, 0, 0
        self._order = self._generator_state()
        for batch in super().__iter__():
            self._done += 1
            if self._done > skip:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches of the epoch have been read, and how the epoch is shuffled."""
        end = min(self.limit, len(self)) if isinstance(self.limit, int) else int(self.limit * len(self))
        if self._done >= end:  # the next epoch
            return {"done": 0, "order": self._generator_state()}
        return {"done": self._done, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches that have been read."""
        self._skip = state["done"]
        if self.generator is not None and state["order"] is not None:
            self.generator.set_state(state["order"])

    def _generator_state(self) -> Any:
        return None if self.generator is None else self.generator.get_state()
