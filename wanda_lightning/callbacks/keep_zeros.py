"""Keep the zeros of a pruned model while it trains."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from wanda_lightning.callbacks.held_zeros import HeldZeros, prunable_layers, zeros_of
from wanda_lightning.callbacks.trainer import processes_of, pruning_target
from wanda_lightning.checks import refuse_pytorch_lightning
from wanda_lightning.refusals import refuse_spread_experts


class KeepZeros(Callback):
    """Keep every zero of a model that was pruned earlier at zero while the model trains.

    `PruningCallback` does this for the layers that it prunes. `KeepZeros` keeps the zeros that each prunable layer has
    when training starts. A layer that is all zeros is skipped, since some layers are initialized to zero.
    """

    def __init__(self) -> None:
        self._zeros = HeldZeros()
        self._resumed: list[str] = []  # layers of a loaded checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer of `pytorch_lightning`, or a strategy that distributes the model in an unsupported way."""
        refuse_pytorch_lightning(trainer)
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
            rank_zero_warn("KeepZeros found no zeros in any prunable layer. Load pruned weights, or prune first.")
        self._zeros.hold(target, layers)
        self._zeros.clear(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._zeros.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the layers and which of their zeros are not kept; the kept zeros are in the weights."""
        return {"layers": self._resumed or self._zeros.layers, "unheld_zeros": self._zeros.unheld_zeros()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._resumed = state_dict["layers"]
        self._zeros.load(state_dict["unheld_zeros"])
