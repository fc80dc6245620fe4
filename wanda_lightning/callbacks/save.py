"""Write the trained model as a folder of its own library."""

from __future__ import annotations

import os

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from wanda_lightning.files import refuse_replacement


class SavePretrained(Callback):
    """Save the model when training ends, by the module's own `save_pretrained(folder, overwrite)`.

    Adapters are merged first, by its `merge()` where it has one.

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
            MisconfigurationException: If the module cannot save itself.
        """
        if stage != "fit":
            return
        refuse_replacement(self.folder, self.overwrite)
        if not callable(getattr(pl_module, "save_pretrained", None)):
            raise MisconfigurationException(
                f"SavePretrained calls save_pretrained(folder, overwrite), but {type(pl_module).__name__} has none: "
                "define it, or use Lightning's ModelCheckpoint"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge and save, in one process."""
        if callable(merge := getattr(pl_module, "merge", None)):
            merge()
        if trainer.is_global_zero:
            pl_module.save_pretrained(self.folder, overwrite=self.overwrite)  # type: ignore[operator]
