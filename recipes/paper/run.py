"""Reproduce the paper's tables: run any subset of their cells and print the published number beside ours.

    python recipes/paper/run.py recipes/paper/llama.yaml --out out/paper
    python recipes/paper/run.py recipes/paper/*.yaml --out out/paper --only '7B/wanda_*' 'opt/*' --dry_run
    python recipes/paper/run.py recipes/paper/llama.yaml --out out/small --model MODEL.gguf \
        --set nsamples=16 seqlen=512 limit=40 calibration=python-docs eval=python-docs
    python recipes/paper/run.py recipes/paper/*.yaml --out out/paper --dry_run --table docs/paper.md

Cost and result: the cells of llama.yaml at 50 % and 2:4 on SmolLM2-135M-Instruct, with the options and texts of
docs/measured.md, take 13 minutes on 2 CPU cores and give the numbers there. No table has been run on the paper's
models.

A family is one YAML file: `options` for all cells, `models` by name, `cells` by name with options of their own, and the
`source` of the `published` numbers. Each cell is one `wanda-lightning prune` in a process of its own, which leaves its
report, its output and, when it is finished, cell.json in DIR/FAMILY/MODEL/CELL. The same command again runs only the
unfinished cells. A published number is shown only beside a measurement with the options of the file: not with --model,
and not with --set except for the options in SAME_NUMBER. For local copies of the models, put their folders into the
file.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.console import Console
from rich.table import Table

from wanda_lightning.cli import parse_options
from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.wording import did_you_mean
from wanda_lightning.report import REPORT_NAME

# Options that do not change the number of a cell, and those that this script gives to each command.
SAME_NUMBER = {"batch_size", "cache_dir", "trust_remote_code", "eval_zero_shot", "tasks_dir"}
SET_HERE = {"model", "save", "save_model", "overwrite"}
# Keys of a family; the last two come together or not at all.
KEYS = {"options", "models", "cells", "source", "published"}


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    `options` are text, since YAML reads 2:4 as 124. `own` are the options that distinguish the cell from the others.
    `published` has the comparable numbers, also of the dense model.
    """

    family: str
    model: str
    name: str
    options: dict[str, str]
    own: dict[str, str]
    published: dict[str, float]
    caption: str
    is_zero_shot: bool  # whether the number is the mean accuracy of the tasks

    @property
    def path(self) -> str:
        """FAMILY/MODEL/CELL."""
        return f"{self.family}/{self.model}/{self.name}"

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches the path, or the end of it."""
        return any(fnmatch.fnmatchcase(self.path, glob) for glob in (pattern, f"*/{pattern}"))

    def command(self, out: Path) -> list[str]:
        """Return the arguments of `wanda-lightning`."""
        arguments = ["prune"]
        for name, value in self.options.items():
            if value == "true":
                arguments.append(f"--{name}")
            elif value != "false":
                arguments.append(f"--{name}={value}")
        return [*arguments, f"--save={out / self.path}", "--overwrite"]

    def finished(self, out: Path) -> dict[str, Any] | None:
        """Return the record of a finished run, perhaps with other options."""
        record = out / self.path / "cell.json"
        report = out / self.path / REPORT_NAME
        return _read(record) if record.is_file() and report.is_file() else None

    def run(self, out: Path) -> dict[str, Any]:
        """Run the command, and write and return the record that makes this a finished cell.

        Raises:
            RuntimeError: It failed. The message has its status and the last line that it printed.
        """
        folder = out / self.path
        output = folder / "output.txt"
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with output.open("w", encoding="utf-8") as file:
            status = launch(self.command(out), file)
        if status == 130:  # only the command received Ctrl-C
            raise KeyboardInterrupt
        if status:
            last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise RuntimeError(f"failed with status {status}: {last} (all of it: {output})")

        report = _read(folder / REPORT_NAME)
        run = report["run"]
        record: dict[str, Any] = {
            "options": self.options,
            "sparsity": report["sparsity"],
            "zero_shot": run["zero_shot"],
            "metric": run["metric"],
            "dense": run["before"],
            "pruned": run["after"],
            "ours": run["after"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        if self.is_zero_shot:
            record |= _accuracies(run)
        _write(folder / "cell.json", record)
        return record


def _accuracies(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean accuracy of the zero-shot tasks as the number of a cell."""
    return {
        "metric": "zero-shot accuracy",
        "dense": run["dense_zero_shot"]["mean"]["acc"],
        "ours": run["zero_shot"]["mean"]["acc"],
    }


def launch(command: Sequence[str], output: TextIO) -> int:
    """Run `wanda-lightning` in a process of its own, write what it prints to a file, and return its exit status."""
    print("$", shlex.join(["wanda-lightning", *command]), file=output, flush=True)
    process = [sys.executable, "-m", "wanda_lightning", *command]
    return subprocess.run(process, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def read_cells(
    path: Path, model: str | None = None, changes: Mapping[str, str] = {}
) -> Iterator[Cell]:
    """Read the cells of a family. `model` replaces its models, and `changes` the options of its cells."""
    # BaseLoader keeps values as text, since YAML reads 2:4 as 124.
    family = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    expected = KEYS if "published" in family else KEYS - {"source", "published"}
    wrong = sorted(expected ^ family.keys())
    if wrong:
        raise ValueError(
            f"{path} must have the keys {', '.join(sorted(KEYS))}, but it differs in {', '.join(wrong)}."
        )

    published = family.get("published", {})
    caption = f"Published: {family['source']}" if published else ""
    if published and (model or changes.keys() - SAME_NUMBER):
        published = {}
        caption = "Published numbers are not shown: they are about another model or other options."

    is_zero_shot = family["options"].get("eval_zero_shot") == "true"
    models = family["models"]
    if model:
        folder = re.sub(r"[^\w.-]+", "_", Path(model).resolve().name)
        models = {folder: model}
    for name, model_id in models.items():
        numbers = {
            cell: float(by_model[name]) for cell, by_model in published.items() if name in by_model
        }
        for cell, own in family["cells"].items():
            options = {"model": model_id, **family["options"], **own, **changes}
            yield Cell(path.stem, name, cell, options, own, numbers, caption, is_zero_shot)


def plan(
    paths: Sequence[Path], only: Sequence[str], model: str | None, changes: Mapping[str, str]
) -> list[Cell]:
    """Return the cells to run, in order: those that a glob in `only` matches, or all.

    Raises:
        ValueError: Two files share a name, a glob matches no cell, or a change is not one of options that cells share.
    """
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(
            "Two files with the same name would share a folder of results. Rename one."
        )
    cells = [cell for path in paths for cell in read_cells(path, model, changes)]
    for pattern in only:
        if not any(cell.matches(pattern) for cell in cells):
            near = did_you_mean(pattern, [cell.path for cell in cells])
            raise ValueError(f"--only {pattern} matches no cell.{near}")
    if only:
        cells = [cell for cell in cells if any(map(cell.matches, only))]

    for name in changes:
        if name in SET_HERE:
            raise ValueError(
                f"--set {name} cannot be used, since this script sets it for each cell."
            )
        for cell in cells:
            if name in cell.own:
                raise ValueError(
                    f"--set {name} would make {cell.path} another cell. Choose cells with --only."
                )
    return cells


def check(cells: Sequence[Cell], out: Path, overwrite: bool) -> None:
    """Raise a ValueError for an option that a command would refuse, and for a finished cell with other options."""
    for cell in cells:
        command, *arguments = cell.command(out)
        try:
            parse_options(command, arguments)
        except ValueError as error:
            raise ValueError(f"{cell.path}: {error}") from error

        record = cell.finished(out)
        if record is None or overwrite:
            continue
        now = cell.options
        before = record["options"]
        changed = [
            f"{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{out / cell.path} has other options: {'; '.join(changed)}. Use another --out or --overwrite."
            )


def run_all(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """Run the unfinished cells. Return a row for each cell, and before the first of a model one for the dense model."""
    rows: list[dict[str, Any]] = []
    measured_dense = set()
    for number, cell in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {cell.path}: ", end="", flush=True)
        record = cell.finished(out)
        how = "there already"
        try:
            if record is None or record["options"] != cell.options:
                record = cell.run(out)
                how = "measured"
            print(f"{_number(record)}, {how}", flush=True)
        except RuntimeError as error:
            record = None
            print(error, flush=True)

        model = {"family": cell.family, "model": cell.model}
        if record and (cell.family, cell.model) not in measured_dense:
            measured_dense.add((cell.family, cell.model))
            rows.append(
                {
                    **model,
                    "cell": "dense",
                    "metric": record["metric"],
                    "ours": record["dense"],
                    "sparsity": 0.0,
                    "seconds": None,
                    "published": cell.published.get("dense"),
                }
            )
        row = {**model, "cell": cell.name}
        for name in ("metric", "ours", "sparsity", "seconds"):
            row[name] = record[name] if record else None
        row |= {"published": cell.published.get(cell.name), "options": cell.options}
        rows.append(row)
    return rows


def table_of(family: str, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of a family as a table."""
    first = next(cell for cell in cells if cell.family == family)
    options = first.options
    if first.is_zero_shot:
        metric = "mean accuracy of the seven zero-shot tasks"
    elif "data_path" in options:
        metric = f"top-1 on {options['data_path']}"
    else:
        text = options.get("eval", "wikitext2")
        metric = f"perplexity on {text}, {options.get('seqlen', '2048')} tokens a window"

    table = Table(title=f"{family}: {metric}", caption=first.caption)
    table.add_column("model")
    table.add_column("cell")
    for heading in ("sparsity", "ours", "published", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["family"] != family:
            continue
        sparsity = f"{row['sparsity']:.2%}" if row["metric"] else ""
        ours = _number(row) if row["metric"] else "failed"
        published = f"{row['published']:.2f}" if row["published"] else ""
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        table.add_row(row["model"], row["cell"], sparsity, ours, published, seconds)
    return table


def write_table(path: Path, cells: Sequence[Cell], out: Path) -> None:
    """Write a page of Markdown with a table for each family: the published number of each cell beside the measured one.

    The column of measured numbers is empty for cells that are not finished.
    """
    lines = [
        "# Reproduce the paper",
        "",
        "Each row is a cell of a table of the Wanda paper: its perplexity, or its accuracy in percent. *published* is",
        "the paper's number; where it is empty, look it up in the paper. *measured* is filled from finished runs;",
        "where it is empty, the cell has not been run. This runs all cells of a family, and continues after an",
        "interruption; `--only CELL` runs one of them:",
        "",
        "```bash",
        f"python recipes/paper/run.py recipes/paper/FAMILY.yaml --out {out} --table FILE.md",
        "```",
    ]
    for family in dict.fromkeys(cell.family for cell in cells):
        own = [cell for cell in cells if cell.family == family]
        options = _as_text(_shared(own))
        lines += ["", f"## {family}", ""]
        if own[0].caption:
            lines += [own[0].caption, ""]
        lines += [f"`wanda-lightning prune {options} ...`", ""]
        lines += ["| cell | published | measured | options |", "| --- | ---: | ---: | --- |"]
        with_dense = set()
        for cell in own:
            record = cell.finished(out)
            if record is not None and record["options"] != cell.options:
                record = None
            if cell.model not in with_dense:
                with_dense.add(cell.model)
                dense = record and {**record, "ours": record["dense"]}
                lines.append(_line(cell, "dense", dense, ""))
            lines.append(_line(cell, cell.name, record, f"`{_as_text(cell.own)}`"))
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_text(options: Mapping[str, str]) -> str:
    """Return options as they are written in a shell."""
    return " ".join(
        f"--{name}" if value == "true" else f"--{name} {value}" for name, value in options.items()
    )


def _line(cell: Cell, name: str, record: Mapping[str, Any] | None, choices: str) -> str:
    """Return a row of the page: a cell, or the dense model."""
    published = cell.published.get(name)
    shown = "" if published is None else f"{published:.2f}"
    measured = "" if record is None else _number(record)
    return f"| {cell.family}/{cell.model}/{name} | {shown} | {measured} | {choices} |"


def _shared(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the options that all cells of a family share, which are those of the family."""
    first = cells[0]
    return {
        name: value for name, value in first.options.items() if name not in ("model", *first.own)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 if a cell failed or the input is refused; 2 for wrong usage; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("recipes", nargs="+", type=Path, metavar="FAMILY.yaml")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="finished cells in it are not run again",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="for FAMILY/MODEL/CELL, or the end of it",
    )
    parser.add_argument(
        "--model",
        help="hub id, folder, .gguf file or timm:NAME, which replaces the families' models",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="such as nsamples=16 limit=40"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE.md",
        help="write a page with published and measured numbers",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands of the unfinished cells"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="run finished cells with other options again"
    )
    arguments = parser.parse_args(argv)
    out = arguments.out
    try:
        changes = {}
        for change in arguments.set:
            name, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"--set must be OPTION=VALUE, but it is {change}.")
            changes[name] = value
        cells = plan(arguments.recipes, arguments.only, arguments.model, changes)
        check(cells, out, arguments.overwrite)
        if arguments.dry_run:
            for cell in cells:
                record = cell.finished(out)
                if record is None or record["options"] != cell.options:
                    print(shlex.join(["wanda-lightning", *cell.command(out)]))
        else:
            rows = run_all(cells, out)
        if arguments.table:
            write_table(arguments.table, cells, out)
        if arguments.dry_run:
            return 0
    except (ValueError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrun.py: interrupted; the same command runs the unfinished cells", file=sys.stderr)
        return 130

    _write(out / "results.json", rows)
    for family in dict.fromkeys(cell.family for cell in cells):
        Console(emoji=False).print(table_of(family, cells, rows))
    return 0 if all(row["metric"] for row in rows) else 1


def _number(row: Mapping[str, Any]) -> str:
    """Return a perplexity as it is, and an accuracy in percent."""
    scale = 1 if "perplexity" in row["metric"] else 100
    return f"{scale * row['ours']:.2f}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
