"""Prune a collection of models, and leave for each a folder with the model, its card, its results and its report.

    python recipes/collection.py recipes/collection.yaml --out out/collection

A collection is a YAML file: `models` by name, each with options of `wanda-lightning prune`, and `options` that all of
them share. Each model is one command in a process of its own, which leaves the model with its card in DIR/NAME/NAME,
and pruning_report.json, report.html and output.txt beside it. `hf upload OWNER/NAME DIR/NAME/NAME` uploads a model.

All entries are checked before the first one runs. One that fails does not stop the others, and the exit status is 1.
The same command again runs only what is not finished: a model that was interrupted is pruned from its start, or with
`stream: true` from its last block. Needs the extra `report`, and a system with locks on files (not Windows).

Cost and result: see collection.yaml, which has two small models.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from wanda_lightning import PruningConfig, PruningReport
from wanda_lightning.cli import parse
from wanda_lightning.cli.commands import refuse
from wanda_lightning.cli.options import values_of
from wanda_lightning.report import REPORT_NAME
from wanda_lightning.report.descriptions import METRICS, change_of

# Options that this script gives to each command.
SET_HERE = ("save", "save_model", "report", "overwrite")


@dataclass(frozen=True)
class Entry:
    """A model of the collection. `options` are text or lists of text, since YAML reads 2:4 as 124."""

    name: str
    options: dict[str, Any]
    folder: Path

    @property
    def model(self) -> Path:
        """The folder of the pruned model."""
        return self.folder / self.name

    def command(self) -> list[str]:
        """Return the arguments of `wanda-lightning`."""
        arguments = ["prune"]
        for name, value in self.options.items():
            if value == "true":
                arguments.append(f"--{name}")
                continue
            for part in value if isinstance(value, list) else [value]:
                if part not in ("false", "null"):
                    arguments.append(f"--{name}={part}")
        places = {"save": self.folder, "save_model": self.model, "report": self._page}
        arguments += [f"--{name}={place}" for name, place in places.items()]
        return [*arguments, "--overwrite"]

    def check(self) -> None:
        """Raise an error that names the entry, for what the command would refuse before it loads the model."""
        try:
            for name in SET_HERE:
                if name in self.options:
                    raise ValueError(f"{name} must be left out, since this script sets it.")
            groups = self._groups()
            refuse(*groups.values())
            PruningConfig(**groups["pruning"].choices)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name}: {error}") from error

    def report(self) -> PruningReport | None:
        """Return the report of a run that has ended, perhaps with other options."""
        if not (self.folder / REPORT_NAME).is_file():
            return None
        report = PruningReport.load(self.folder)
        # The command writes a first report before the zero-shot tasks, which take hours.
        if report.config["command"]["eval_zero_shot"] and not report.run.zero_shot:
            return None
        return report

    def changes(self, report: PruningReport) -> list[str]:
        """Return the options that a report was not made with."""
        now = _comparable(values_of(*self._groups().values()))
        before = _comparable(report.config["command"])
        return [
            f"{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]

    def run(self) -> str:
        """Prune the model unless that is done, and say so, with its results.

        Raises:
            RuntimeError: The command failed. The message has its status and the last line that it printed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "output.txt"
        with path.open("a", encoding="utf-8") as output:
            _lock(output)
            report = self.report()
            if report is not None:
                return f"there already.{_results_of(report)}"
            status = launch(self.command(), output)

        if status == 130:  # only the command received Ctrl-C
            raise KeyboardInterrupt
        report = self.report()
        if status or report is None:
            last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise RuntimeError(f"failed with status {status}: {last} (all of it: {path})")
        return f"pruned.{_results_of(report)}"

    @property
    def _page(self) -> Path:
        return self.folder / "report.html"

    def _groups(self) -> dict[str, Any]:
        """Return the groups of options of the command."""
        _, groups = parse(self.command())
        del groups["session"]
        return groups


def launch(command: Sequence[str], output: TextIO) -> int:
    """Run `wanda-lightning` in a process of its own, write what it prints to a file, and return its exit status."""
    print("$", shlex.join(["wanda-lightning", *command]), file=output, flush=True)
    process = [sys.executable, "-m", "wanda_lightning", *command]
    return subprocess.run(process, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def read(path: Path, out: Path) -> list[Entry]:
    """Read the entries of a collection, each with a folder in `out`."""
    # BaseLoader keeps values as text.
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(content, dict) or not {"models"} <= content.keys() <= {"models", "options"}:
        raise ValueError(f"{path} must have the key models, and may have options, but no others.")

    entries = []
    for name, own in content["models"].items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{path} must name models like folders, but one is {name!r}.")
        if not isinstance(own, dict):
            raise ValueError(f"{name}: it must have options, at least model, but it is {own!r}.")
        options = {**content.get("options", {}), **own}
        entries.append(Entry(name, options, out / name))
    return entries


def check(entries: Sequence[Entry], overwrite: bool) -> None:
    """Raise a ValueError with all entries that are wrong or were finished with other options.

    With `overwrite`, the folders of the latter are deleted once no entry is wrong.
    """
    wrong = []
    outdated = []
    for entry in entries:
        try:
            entry.check()
            report = entry.report()
            changes = entry.changes(report) if report else []
            if changes and not overwrite:
                raise ValueError(
                    f"{entry.name}: {entry.folder} has other options: {'; '.join(changes)}. Use another --out or "
                    "--overwrite."
                )
            if changes:
                outdated.append(entry.folder)
        except ValueError as error:
            wrong.append(str(error))

    if wrong:
        raise ValueError("\n".join(wrong))
    for folder in outdated:
        shutil.rmtree(folder)


def run_all(entries: Sequence[Entry]) -> list[str]:
    """Prune each model. Return the names of those that failed."""
    failed = []
    for number, entry in enumerate(entries, start=1):
        print(f"[{number}/{len(entries)}] {entry.name}: ", end="", flush=True)
        try:
            print(entry.run(), flush=True)
        except (RuntimeError, ValueError, OSError) as error:
            failed.append(entry.name)
            print(error, flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 if a model failed or the input is refused; 2 for wrong usage; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("collection", type=Path, metavar="COLLECTION.yaml")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="finished models in it are not pruned again",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="prune models that have other options again"
    )
    arguments = parser.parse_args(argv)
    try:
        entries = read(arguments.collection, arguments.out)
        check(entries, arguments.overwrite)
        failed = run_all(entries)
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"collection.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncollection.py: interrupted; the same command goes on", file=sys.stderr)
        return 130

    if failed:
        print(f"{len(failed)} of {len(entries)} failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def _results_of(report: PruningReport) -> str:
    """Return a sentence for each result, after a space."""
    metric = METRICS.get(report.run.metric)
    return "".join(f" {change_of(metric, result)}" for result in report.run.results)


def _comparable(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that decide on the result, as JSON, without those that are not given."""
    asked = {name: value for name, value in options.items() if value and name not in SET_HERE}
    return json.loads(json.dumps(asked))


def _lock(output: TextIO) -> None:
    """Wait until no process has the file open for a run.

    A killed script leaves its command running, which inherited the lock. Two commands would write into one folder.
    """
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for the command of another run ... ", end="", flush=True)
        fcntl.flock(output, fcntl.LOCK_EX)


if __name__ == "__main__":
    sys.exit(main())
