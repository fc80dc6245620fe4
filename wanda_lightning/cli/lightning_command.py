"""`wanda-lightning fit|validate|test|predict`: the Trainer on a YAML recipe."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

SUBCOMMANDS = ("fit", "validate", "test", "predict")


class _SaveConfigBesideLogs(SaveConfigCallback):
    """Without a logger there is no folder of this run, and the working directory is not ours to write to."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


def run_lightning(arguments: Sequence[str] | None) -> None:
    """Run LightningCLI; model, data and callbacks are named by class path, ours or anyone's.

    Args:
        arguments: The command line; None reads the shell's.
    """
    LightningCLI(
        args=None if arguments is None else list(arguments),
        seed_everything_default=0,
        parser_kwargs={"prog": "wanda-lightning"},
        save_config_callback=_SaveConfigBesideLogs,
    )
