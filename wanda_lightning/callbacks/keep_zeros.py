"""Hold pruned weights at zero while a model trains."""

from __future__ import annotations

from typing import Any

import lightning as L

from wanda_lightning.callbacks.trainer import processes_of, pruning_target
from wanda_lightning.callbacks.zeros import ZerosCallback
from wanda_lightning.common.checks import refuse_pytorch_lightning
from wanda_lightning.common.errors import UserError


class KeepZeros(ZerosCallback):
    """Keep every zero of a model that was pruned earlier at zero while the model trains.

    `PruningCallback` does this for the layers that it prunes. `KeepZeros` keeps the zeros that each prunable layer has
    when training starts. A layer that is all zeros is skipped, since some layers are initialized to zero.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer of `pytorch_lightning`, or a strategy that distributes the model in an unsupported way."""
        refuse_pytorch_lightning(trainer)
        processes_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the zeros and hold them."""
        self._zeros.hold_all(pruning_target(pl_module), processes_of(trainer))
        self._clear_copies(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the layers and which of their zeros are not kept; the kept zeros are in the weights."""
        return self._zeros.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._zeros.load_state_dict(state_dict)

    def on_init_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse the Trainer of transformers, which calls this hook."""
        raise UserError(
            "callbacks of transformers' Trainer must be its own, but KeepZeros is a callback of Lightning's Trainer. "
            "Use wanda_lightning.integrations.transformers.KeepZerosCallback()."
        )
