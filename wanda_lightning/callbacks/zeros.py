"""`KeepZeros`, and the base class of all callbacks that prune or keep zeros."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from wanda_lightning.callbacks.prunable_module import pruning_target
from wanda_lightning.callbacks.trainer import averaged_models, processes_of
from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.report import PruningReport
from wanda_lightning.training.held_zeros import HeldZeros


class ZerosCallback(Callback):
    """A callback that prunes or keeps zeros while a model trains; other callbacks read its properties."""

    def __init__(self) -> None:
        self._zeros = HeldZeros()

    @property
    def is_finished(self) -> bool:
        """Whether it has pruned the model to its final sparsity, or never prunes."""
        return True

    @property
    def report(self) -> PruningReport | None:
        """The report of the latest pruning; None before the first."""
        return None

    def on_train_end(self, *_: Any) -> None:
        """Remove the hooks."""
        self._zeros.release()

    on_exception = on_train_end  # type: ignore[assignment]  # of any arguments

    def _clear_copies(self, trainer: Trainer) -> None:
        """Zero copies of held zeros: the optimizers' moments, and the weights that averaging callbacks average."""
        self._zeros.clear(trainer.optimizers)
        self._zeros.clear_copies(trainer.lightning_module, averaged_models(trainer))


class KeepZeros(ZerosCallback):
    """Keep every zero of a model that was pruned earlier at zero while the model trains.

    The zeros are those that each prunable layer has when training starts, unless it is all zeros, as some layers are
    initialized. `PruningCallback` does this for the layers that it prunes.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that is not supported."""
        processes_of(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the zeros and hold them."""
        self._zeros.hold_all(pruning_target(pl_module), processes_of(trainer))
        self._clear_copies(trainer)

    def state_dict(self) -> Kwargs:
        """Return the names of the layers and which of their zeros are not kept; the kept zeros are in the weights."""
        return self._zeros.state_dict()

    def load_state_dict(self, state_dict: Kwargs) -> None:
        """Restore the state."""
        self._zeros.load_state_dict(state_dict)


def zeros_callbacks(trainer: Trainer) -> list[ZerosCallback]:
    """Return the callbacks of a Trainer that prune or keep zeros."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ZerosCallback)]
