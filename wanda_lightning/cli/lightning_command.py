"""`wanda-lightning fit|validate|test|predict`: the Trainer on a YAML recipe."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

SUBCOMMANDS = ("fit", "validate", "test", "predict")


def run_lightning(arguments: Sequence[str]) -> None:
    """Run LightningCLI; model, data and callbacks are named by class path, ours or anyone's."""
    import wanda_lightning  # noqa: F401  # so that our classes are known by their short names

    LightningCLI(
        args=list(arguments),
        seed_everything_default=0,
        parser_kwargs={"prog": "wanda-lightning"},
        save_config_kwargs={"overwrite": True},
    )
