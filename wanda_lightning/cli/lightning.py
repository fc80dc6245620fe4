"""`wanda-lightning fit|validate|test|predict`: run the Trainer on a YAML recipe."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import wanda_lightning
from wanda_lightning.common.words import did_you_mean

_NO_CAUSE = ("Does not validate", "Subtypes:", "Errors:", "Given value type:")


class _SaveConfigBesideLogs(SaveConfigCallback):
    """Save the configuration only if a logger makes a folder for the run, not into the working directory."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class _Parser(LightningArgumentParser):
    def parse_args(self, *args: Any, **options: Any) -> Any:
        try:
            return super().parse_args(*args, **options)
        except UnicodeDecodeError:
            self.error(
                "a configuration file (--config) must be YAML in UTF-8, but one holds other bytes. Save it as UTF-8."
            )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"wanda-lightning: error: {one_line(message)}\n")
        self.exit(2)


def one_line(message: str) -> str:
    """Shorten a message of jsonargparse, which lists every type that it tried, to the option and the first cause."""
    first, *lines = [line.strip() for line in message.splitlines() if line.strip()]
    if first.startswith("Unexpected config:"):  # with the whole content of the file
        found = "is another text" if [*first.split()[2:], *lines] else "is empty"
        return f"--config must map options to values, like those in recipes/, but it {found}."
    key = re.fullmatch(r'Parser key "([^"]+)":', first)
    given = re.search(r"^ *Given value: (\d+)$", message, re.MULTILINE)
    n, m = divmod(int(given[1]) if given else 0, 60)
    if key and key[1].endswith("pattern") and 1 <= n < m:
        return f'{key[1]}: YAML reads {n}:{m} as the number {60 * n + m}. Quote it: "{n}:{m}".'
    causes = [line for line in lines if not line.startswith(_NO_CAUSE)] if key else [first, *lines]
    following = [number for number, line in enumerate(causes) if number and line.startswith(("- ", "Given value"))]
    cause = " ".join(causes[: following[0]] if following else causes).removeprefix("- ").rstrip(".")
    class_name = re.search(r"module 'wanda_lightning[\w.]*' has no attribute '(\w+)'", cause)
    near = did_you_mean(class_name[1], wanda_lightning.__all__) if class_name else ""
    return f"{key[1]}: {cause}.{near}" if key else f"{cause}.{near}"


def run(arguments: list[str] | None) -> None:
    """Run LightningCLI, whose class paths name any model, data and callbacks; None reads `sys.argv`."""
    LightningCLI(
        args=arguments,
        seed_everything_default=0,
        parser_class=_Parser,
        parser_kwargs={"prog": "wanda-lightning"},
        save_config_callback=_SaveConfigBesideLogs,
    )
