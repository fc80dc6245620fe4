"""Write the trained model as a folder of its own library."""

from __future__ import annotations

import os

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from wanda_lightning.files import refuse_replacement


class SavePretrained(Callback):
    """Save the model when training ends, by the module's own `save_pretrained(folder, overwrite)`.

    Adapters are merged first, by its `merge()` where it has one: what is saved loads without peft, and the module in
    memory has none any more. Checkpoints that Lightning wrote while there were adapters load into a module with them.

    Args:
        folder: Where to write it.
        overwrite: Replace a model that is there.
    """

    def __init__(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.folder = folder
        self.overwrite = overwrite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written, before anything is trained.

        Raises:
            FileExistsError: If the folder is not empty, see `overwrite`.
            MisconfigurationException: If the module cannot save itself, or no process holds all of it.
        """
        if stage != "fit":
            return
        refuse_replacement(self.folder, self.overwrite)
        if not callable(getattr(pl_module, "save_pretrained", None)):
            raise MisconfigurationException(
                f"SavePretrained calls save_pretrained(folder, overwrite), but {type(pl_module).__name__} has none: "
                "define it, or use Lightning's ModelCheckpoint"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"SavePretrained writes a folder from one process that holds the whole model, but "
                f"{type(trainer.strategy).__name__} spreads it: use Lightning's ModelCheckpoint, with "
                "ModelParallelStrategy(save_distributed_checkpoint=False) for one ordinary file"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge and save, in one process."""
        if callable(merge := getattr(pl_module, "merge", None)):
            merge()
        if trainer.is_global_zero:
            pl_module.save_pretrained(self.folder, overwrite=self.overwrite)  # type: ignore[operator]
