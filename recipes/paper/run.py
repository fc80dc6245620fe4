"""The paper's tables as sweeps: any subset of the cells, the published number beside ours.

    python recipes/paper/run.py recipes/paper/llama.yaml --out out/paper
    python recipes/paper/run.py recipes/paper/*.yaml --out out/paper --only '7B/wanda_*' 'opt/*' --dry_run
    python recipes/paper/run.py recipes/paper/llama.yaml --out out/small --model MODEL.gguf \
        --set nsamples=16 seqlen=512 limit=40 calibration=python-docs eval=python-docs

A family (one YAML) is `cells` by `models`. Each cell is one `wanda-lightning prune` in a process of its own, which
leaves its report, its output and, last of all, cell.json in DIR/FAMILY/MODEL/CELL. The same command again runs only the
cells without one. A cell with `finetune` flags goes on to `wanda-lightning finetune` and `evaluate`, with the window of
the table, and keeps both models.

Published numbers are shown only beside what was measured as the YAML says: not with --model, nor with --set of anything
but what SAME_NUMBER lists. For local copies of the paper's models, name their folders in the YAML.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import inspect
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from wanda_lightning.cli import command_parser
from wanda_lightning.cli.finetune_command import finetune_model
from wanda_lightning.cli.prune_command import prune_model
from wanda_lightning.files import whole_file
from wanda_lightning.report import REPORT_NAME

SAME_NUMBER = frozenset({"batch_size", "cache_dir", "trust_remote_code", "eval_zero_shot", "tasks_dir"})
_MEASURED_BY = frozenset({"seqlen", "eval", "limit", "data_path"})
_STEPS = {"prune": prune_model, "finetune": finetune_model}
_GIVEN_BY_US = frozenset({"model", "dense", "save", "save_model", "overwrite"})
_TO_FINETUNE = ("eval", "limit", "cache_dir", "trust_remote_code")
_TO_EVALUATE = (*_TO_FINETUNE, "seqlen", "batch_size", "dtype")

Steps = dict[str, dict[str, str]]  # flags of prune, and perhaps of finetune; as text, since 2:4 is 124 in YAML


@dataclass(frozen=True)
class Family:
    """One table of the paper.

    Attributes:
        name: Of the YAML file.
        options: What all cells share.
        models: Names to hub ids, folders or timm:NAME.
        cells: Names to flags.
        source: Where the published numbers stand.
        published: Cell, or dense, to model to perplexity, or accuracy in percent.
    """

    name: str
    options: Steps
    models: dict[str, str]
    cells: dict[str, Steps]
    source: str = ""
    published: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.models, *self.cells):
            if not re.fullmatch(r"[\w.-]*\w", name):
                raise ValueError(f"{name!r} would name a folder: use letters, digits, '_', '-' and '.'")
        if "dense" in self.cells:
            raise ValueError("dense is the row that every cell measures before it prunes: leave it out of cells")
        for cell, steps in self.cells.items():
            for option in sorted(_MEASURED_BY & steps["prune"].keys()):
                raise ValueError(f"the cells of one table are measured alike: move {option} of {cell} to options")
        for cell, numbers in self.published.items():
            _refuse_unknown([cell], ["dense", *self.cells], "published: there is no cell")
            _refuse_unknown(numbers, self.models, f"published.{cell}: there is no model")
        if self.published and not (self.source and {"seqlen", "data_path"} & self.options["prune"].keys()):
            raise ValueError("published numbers need a source, and options the seqlen or data_path they stand for")


@dataclass(frozen=True)
class Cell:
    """One number of a table, and what is run for it."""

    family: Family
    model: str
    name: str
    steps: Steps
    comparable: bool

    @property
    def path(self) -> str:
        """FAMILY/MODEL/CELL."""
        return f"{self.family.name}/{self.model}/{self.name}"

    def published(self, row: str) -> float | None:
        """What the paper says, unless something else is measured."""
        return self.family.published.get(row, {}).get(self.model) if self.comparable else None

    def commands(self, out: Path) -> list[list[str]]:
        """The arguments of `wanda-lightning`, step by step."""
        folder, options = out / self.path, self.steps["prune"]
        pruned, tuned = folder / "pruned", folder / "finetuned"
        prune = ["prune", *_arguments(options), f"--save={folder}", "--overwrite"]
        if "finetune" not in self.steps:
            return [prune]
        shared = {name: options[name] for name in _TO_FINETUNE if name in options}
        measure = {name: options[name] for name in _TO_EVALUATE if name in options}
        return [
            [*prune, f"--save_model={pruned}"],
            [
                *("finetune", f"--model={pruned}", *_arguments(shared | self.steps["finetune"])),
                *(f"--save_model={tuned}", "--overwrite"),
            ],
            ["evaluate", f"--model={tuned}", *_arguments(measure), f"--save={folder}/evaluation.json", "--overwrite"],
        ]

    def record(self, out: Path) -> dict[str, Any] | None:
        """What a finished run has left, perhaps with other options."""
        folder = out / self.path
        return _read(folder / "cell.json") if (folder / "cell.json").is_file() else None

    def finish(self, out: Path, seconds: float) -> dict[str, Any]:
        """Gather what the commands wrote into the record that makes this a finished cell."""
        folder = out / self.path
        report = _read(folder / REPORT_NAME)
        record = {"steps": self.steps, "sparsity": report["sparsity"], **report["config"]["measured"]}
        record["ours"] = record["pruned"]
        if "finetune" in self.steps:
            (results,) = _read(folder / "evaluation.json")["models"].values()
            (record["ours"],) = [found["perplexity"] for found in results.values() if "perplexity" in found]
        record["seconds"] = round(seconds, 1)
        _write(folder / "cell.json", record)
        return record


def load_family(path: str | Path) -> Family:
    """Read a YAML file.

    Raises:
        ValueError: For what it should not hold.
        OSError: If it cannot be read.
    """
    path = Path(path)
    try:
        content = _mapping(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader), "the file")
        keys = ("options", "models", "cells", "source", "published")
        _refuse_unknown(content, keys, "there is no key")
        for key in keys[:3]:
            if not content.get(key):
                raise ValueError(f"it has no {key}")
        published = _mapping(content.get("published", {}), "published")
        return Family(
            path.stem,
            _steps(content["options"], "options"),
            _mapping(content["models"], "models"),
            {cell: _steps(flags, f"cells.{cell}") for cell, flags in _mapping(content["cells"], "cells").items()},
            content.get("source", ""),
            {
                cell: {model: float(number) for model, number in _mapping(numbers, f"published.{cell}").items()}
                for cell, numbers in published.items()
            },
        )
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def plan(
    families: Iterable[Family],
    only: Sequence[str] = (),
    model: str | None = None,
    changes: Mapping[str, str] | None = None,
) -> list[Cell]:
    """The cells to run, in order.

    Args:
        families: All that could run.
        only: Globs for FAMILY/MODEL/CELL, or the end of it; none for all.
        model: Takes the place of each family's models.
        changes: Options, those of finetune as `finetune.steps`, to values.

    Raises:
        ValueError: If a glob matches no cell, or a change is no option or one that makes a cell what it is.
    """
    changed: Steps = {step: {} for step in _STEPS}
    for option, value in (changes or {}).items():
        step, _, name = option.rpartition(".")
        _refuse_unknown([step or "prune"], _STEPS, "--set: there is no step")
        changed[step or "prune"][name] = value
    for step, flags in changed.items():
        _refuse_flags(step, flags, "--set")
    comparable = model is None and not changed["finetune"] and changed["prune"].keys() <= SAME_NUMBER
    cells = []
    for family in families:
        models = family.models if model is None else {re.sub(r"[^\w.-]+", "_", Path(model).resolve().name): model}
        for name, model_id in models.items():
            for cell, own in family.cells.items():
                steps = {step: family.options.get(step, {}) | own[step] | changed[step] for step in own}
                cells.append(
                    Cell(family, name, cell, {**steps, "prune": {"model": model_id, **steps["prune"]}}, comparable)
                )
    for pattern in only:
        if not any(_matches(cell.path, pattern) for cell in cells):
            near = difflib.get_close_matches(pattern, [cell.path for cell in cells], n=3, cutoff=0.0)
            raise ValueError(f"--only {pattern} matches no cell. Near it are {', '.join(near)}")
    chosen = [cell for cell in cells if not only or any(_matches(cell.path, pattern) for pattern in only)]
    if changed["finetune"] and not any("finetune" in cell.steps for cell in chosen):
        raise ValueError("--set finetune: no chosen cell is fine-tuned")
    for cell in chosen:
        for step, own in cell.family.cells[cell.name].items():
            for name in own.keys() & changed[step].keys():
                raise ValueError(
                    f"--set {name}: {cell.path} is what it is by {name}={own[name]}. Choose cells with --only"
                )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 if a cell failed or the input is refused; 2 for wrong usage; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("recipes", nargs="+", metavar="FAMILY.yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="what is there is not made again")
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="of FAMILY/MODEL/CELL, or the end of it")
    parser.add_argument("--model", help="hub id, folder, .gguf file or timm:NAME, instead of the families' models")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="such as nsamples=16 limit=40")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that would run")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there with other options")
    given = parser.parse_args(argv)
    try:
        families = [load_family(path) for path in given.recipes]
        if len({family.name for family in families}) < len(families):
            raise ValueError("two files of one name would share a folder of results: rename one")
        if wrong := [change for change in given.set if "=" not in change]:
            raise ValueError(f"--set takes OPTION=VALUE, but {wrong[0]} was given")
        cells = plan(families, given.only, given.model, dict(change.split("=", 1) for change in given.set))
        _refuse(cells, given.out, given.overwrite)
    except (ValueError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 1
    if given.dry_run:
        for cell in cells:
            if _finished(cell, given.out) is None:
                print(*(shlex.join(["wanda-lightning", *command]) for command in cell.commands(given.out)), sep="\n")
        return 0
    try:
        results = [(cell, _run(cell, given.out, f"[{k}/{len(cells)}]")) for k, cell in enumerate(cells, start=1)]
    except KeyboardInterrupt:
        print("\nrun.py: interrupted; the same command goes on with what is not there", file=sys.stderr)
        return 130
    rows = _rows(results)
    _write(given.out / "results.json", rows)
    for family in families:
        if shown := [row for row in rows if row["family"] == family.name]:
            Console(emoji=False).print(_table(family, shown))
    return 0 if all(record for _, record in results) else 1


def launch(command: Sequence[str], output: Path) -> int:
    """Run `wanda-lightning` in a process of its own, what it prints added to a file.

    Returns:
        Its exit status.
    """
    with output.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['wanda-lightning', *command])}\n")
        file.flush()
        process = [sys.executable, "-m", "wanda_lightning", *command]
        return subprocess.run(process, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _run(cell: Cell, out: Path, label: str) -> dict[str, Any] | None:
    """The record of a cell, run unless it is there; None if it failed. One line says which."""
    if record := _finished(cell, out):
        print(f"{label} {cell.path}: {_number(record)}, there already", flush=True)
        return record
    output = out / cell.path / "output.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("", encoding="utf-8")
    print(f"{label} {cell.path}: ", end="", flush=True)
    started = time.perf_counter()
    for command in cell.commands(out):
        status = launch(command, output)
        if status == 130:  # Ctrl-C reached the command alone
            raise KeyboardInterrupt
        if status:
            *_, last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            print(f"failed with status {status}: {last} (all of it: {output})", flush=True)
            return None
    record = cell.finish(out, time.perf_counter() - started)
    print(f"{_number(record)} in {record['seconds']:.0f} s", flush=True)
    return record


def _finished(cell: Cell, out: Path) -> dict[str, Any] | None:
    record = cell.record(out)
    return record if record and record["steps"] == cell.steps and (out / cell.path / REPORT_NAME).is_file() else None


def _refuse(cells: Sequence[Cell], out: Path, overwrite: bool) -> None:
    """Refuse now what a command would refuse to read, and results that were made with other options."""
    parsers = {name: command_parser(name, exit_on_error=False) for name in ("prune", "finetune", "evaluate")}
    for cell in cells:
        for name, *arguments in cell.commands(out):
            try:
                parsers[name].parse_args(arguments)
            except argparse.ArgumentError as error:
                raise ValueError(f"{cell.path}: {error}") from error
        record = cell.record(out)
        if record and record["steps"] != cell.steps and not overwrite:
            before, now = _flat(record["steps"]), _flat(cell.steps)
            other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            changes = [f"{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}" for name in other]
            raise ValueError(
                f"{out / cell.path} was made with other options: {'; '.join(changes)}. Choose another --out, or "
                "have it made again with --overwrite."
            )


def _rows(results: Sequence[tuple[Cell, dict[str, Any] | None]]) -> list[dict[str, Any]]:
    """The cells, before those of a model its dense row; without numbers where a cell failed."""
    rows: list[dict[str, Any]] = []
    for cell, record in results:
        names = {"family": cell.family.name, "model": cell.model}
        about = {"comparable": cell.comparable, "steps": cell.steps}
        row = {key: record and record[key] for key in ("metric", "ours", "sparsity", "seconds")}
        if record and not any({**names, "cell": "dense"}.items() <= other.items() for other in rows):
            dense = {"metric": record["metric"], "ours": record["dense"], "sparsity": 0.0, "seconds": None}
            rows.append({**names, "cell": "dense", **dense, "published": cell.published("dense"), **about})
        rows.append({**names, "cell": cell.name, **row, "published": cell.published(cell.name), **about})
    return rows


def _table(family: Family, rows: Sequence[dict[str, Any]]) -> Table:
    options = rows[0]["steps"]["prune"]
    on = (
        options.get("data_path")
        or f"{options.get('eval', 'wikitext2')}, {options.get('seqlen', '2048')} tokens a window"
    )
    table = Table(title=f"{family.name}: {'top-1' if 'data_path' in options else 'perplexity'} on {on}")
    if not family.published:
        table.caption = "No published numbers here."
    elif rows[0]["comparable"]:
        table.caption = f"Published: {family.source}"
    else:
        table.caption = "Published numbers are not shown: they are of another model or other options than these."
    for heading in ("model", "cell", "sparsity", "ours", "published", "seconds"):
        table.add_column(heading, justify="left" if heading in ("model", "cell") else "right")
    for row in rows:
        ours = [f"{row['sparsity']:.2%}", _number(row)] if row["metric"] else ["", "failed"]
        published = "-" if row["published"] is None else f"{row['published']:.2f}"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        table.add_row(row["model"], row["cell"], *ours, published, seconds)
    return table


def _number(row: Mapping[str, Any]) -> str:
    """As the paper writes it: accuracies in percent."""
    return f"{row['ours'] * (100 if row['metric'] == 'val_accuracy' else 1):.2f}"


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in (pattern, f"*/{pattern}"))


def _arguments(flags: Mapping[str, str]) -> list[str]:
    """Options of a command line; what is true or false stands there by name alone, or not."""
    given = {name: value for name, value in flags.items() if value != "false"}
    return [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in given.items()]


def _flat(steps: Steps) -> dict[str, str]:
    return {
        name if step == "prune" else f"{step}.{name}": v for step, flags in steps.items() for name, v in flags.items()
    }


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} should map names to values, but it is {value!r}")
    return value


def _steps(value: Any, where: str) -> Steps:
    """Flags of prune, with those of finetune under that name."""
    prune = dict(_mapping(value, where))
    steps = {"prune": prune}
    if "finetune" in prune:
        steps["finetune"] = _mapping(prune.pop("finetune"), f"{where}.finetune")
    for step, flags in steps.items():
        _refuse_flags(step, flags, where)
    return steps


def _refuse_flags(step: str, flags: Mapping[str, Any], where: str) -> None:
    names = inspect.signature(_STEPS[step]).parameters.keys() - _GIVEN_BY_US
    _refuse_unknown(flags, names, f"{where}: {step} has no option for this")
    for name, value in flags.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} should be one value, but it is {value!r}")


def _refuse_unknown(names: Iterable[str], known: Iterable[str], problem: str) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"{problem}: {name}. The nearest is {', '.join(near)}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
