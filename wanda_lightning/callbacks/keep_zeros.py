"""Keep the zeros of a pruned model while it trains."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from wanda_lightning.callbacks.batches import processes_of, pruning_target
from wanda_lightning.callbacks.held_zeros import HeldZeros, prunable_layers, zeros_of
from wanda_lightning.refusals import refuse_spread_experts


class KeepZeros(Callback):
    """Keep every zero of a pruned model zero while it trains.

    For a model that was pruned before; `PruningCallback` does the same by itself. What counts is every layer that
    `prune` would prune and that holds zeros when training starts, unless it is zero altogether (freshly initialised).
    """

    def __init__(self) -> None:
        self._zeros = HeldZeros()
        self._resumed: list[str] = []  # layers that the run before held

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose zeros.

        Raises:
            MisconfigurationException: If the strategy spreads the model in a way in which they cannot be held.
        """
        processes_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the zeros and hold them."""
        target = pruning_target(pl_module)
        layers, self._resumed = self._resumed, []
        if not layers:
            found = prunable_layers(target)
            for layer in found:
                refuse_spread_experts(layer)
            sizes = {layer.name: layer.size for layer in found}
            zeros = zeros_of(target, processes_of(trainer))
            layers = [name for name, count in zeros.items() if 0 < count < sizes[name]]
        if not layers:
            rank_zero_warn("KeepZeros found no zeros in any prunable layer: load pruned weights, or prune first")
        self._zeros.hold(target, layers)
        self._zeros.clear(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the zeros."""
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._zeros.release()

    def state_dict(self) -> dict[str, Any]:
        """Which layers are held, and which of their zeros are not; the others are in the weights."""
        return {"layers": self._resumed or self._zeros.layers, "unheld_zeros": self._zeros.unheld_zeros()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where it was."""
        self._resumed = state_dict["layers"]
        self._zeros.load(state_dict["unheld_zeros"])
