"""`wanda-lightning fit|validate|test|predict`: run the Trainer on a YAML recipe."""

import re
from typing import Any

import jsonargparse
import lightning as L
import yaml
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from wanda_lightning.common.checks import SEED, check_values
from wanda_lightning.common.errors import UserError

_load_yaml = jsonargparse.get_loader("yaml")


class _SaveConfigBesideLogs(SaveConfigCallback):
    """Save the configuration only if a logger makes a folder for the run, not into the working directory."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class _CLI(LightningCLI):
    """LightningCLI that refuses wrong options without its usage of a hundred lines, and a seed out of range."""

    def parse_arguments(self, *arguments: Any) -> None:
        try:
            super().parse_arguments(*arguments)
        except jsonargparse.ArgumentError as error:
            raise UserError(
                f"{error}\nGive a YAML recipe with --config FILE.yaml (see recipes/), in which model and data name "
                "classes. Options replace parts of it, such as --model.model NAME; --help_all lists them."
            ) from error

        seed = self.config[self.config.subcommand].seed_everything
        if seed is not None:
            check_values(SEED, seed_everything=int(seed))


def _load(text: str) -> Any:
    """Load YAML, with 2:4 as text, not as the number 124 of base 60."""
    return _load_yaml(re.sub(r"\b(pattern: *)(\d+:\d+)\b", r'\1"\2"', text))


def run() -> None:
    """Run LightningCLI on `sys.argv`; its class paths name any model, data and callbacks."""
    jsonargparse.set_loader("yaml", _load, (yaml.YAMLError,))
    _CLI(
        seed_everything_default=0,
        parser_kwargs={"prog": "wanda-lightning", "exit_on_error": False},
        save_config_callback=_SaveConfigBesideLogs,
    )
