"""The tables of the documentation, from the runs in benchmarks/results.

`TABLES` describes what each part of a page shows, and `Table` writes it. `benchmarks/pages.py` puts it into the pages
that ask for it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from real_sizes import extrapolated
from result import OURS, averaged, read_drawn, read_table
from scipy.stats import sem

ROOT = Path(__file__).parents[1]
REFERENCE = "locuslab/wanda"
LANGUAGE_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_MODEL = "efficientnet_lite0"
ENCODER = "all-MiniLM-L6-v2"
LABELS = {
    "dense": "dense",
    "forward": "a forward pass",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "magnitude": "magnitude",
    "REAP": "REAP",
    "REAP, sum": "REAP, summed (the default)",
    "uses": "number of routed tokens",
    "norms": "norm of the weights",
    "random, seed 0": "at random, seed 0",
    "random, seed 1": "at random, seed 1",
    "random, seed 2": "at random, seed 2",
    "wanda": "Wanda",
    "wanda, row": "Wanda, within a row",
    "wanda, layer": "Wanda, within a layer",
    "variant": "the paper's variant",
    "ria": "`RIA`",
    "owl": "Wanda with `OWL`",
    "fisher": "Wanda with `Fisher`",
    "wanda_none": 'Wanda, `sequential="none"`',
    "wanda_block": 'Wanda, `sequential="block"`',
    "wanda_layer": 'Wanda, `sequential="layer"`',
    "fast": "`fast`",
    "wanda, 2 windows": "Wanda, 2 windows",
    "wanda, 2 windows, each expert alone": "Wanda, 2 windows, each expert alone",
    "sparsegpt": "`SparseGPT`",
    "sparsegpt, 2 windows": "`SparseGPT`, 2 windows",
    "sparsegpt, 2 windows, each expert alone": "`SparseGPT`, 2 windows, each expert alone",
    "sparsegpt at layer": '`SparseGPT`, `sequential="layer"`',
    "sparsegpt_none": '`SparseGPT`, `sequential="none"`',
    "sparsegpt_block": '`SparseGPT`, `sequential="block"`',
    "sparsegpt_layer": '`SparseGPT`, `sequential="layer"`',
    "refit": "`Refit`",
    "refit, biases kept": "`Refit`, biases kept",
    "alps": "ALPS",
    "admm": "`ADMM`",
    "balanced": "`balanced`",
    "balanced, biases kept": "`balanced`, biases kept",
    "admm+reconstruct": "`admm`, then `Reconstruct`",
    "best-row_weights": "`best` without row weights",
    "best+row_weights": "`best` with row weights",
    "best": "`best`",
    "best, biases kept": "`best`, biases kept",
    "best+reconstruct": "`best`, then `Reconstruct`",
    "wanda at layer": 'Wanda, `sequential="layer"`',
    "balanced at layer": '`balanced`, `sequential="layer"`',
    "best at layer": '`best`, `sequential="layer"`',
    "best+distil at layer": '`best`, `sequential="layer"`, then `Distill(blocks=False)`',
    "thorough": "`thorough`",
    "thorough, 3 passes": "`thorough`, always 3 passes",
    "fixed": "then `DistillFromDense`",
    "structured": "units",
    "structured, fisher": "units, by the loss",
    "structured, fisher seconds": "units, by the loss and their seconds",
    "GroupMagnitude": "units, by Torch-Pruning",
    "PPM": "units, by OptiPFair",
    "hybrid PPM": "units, by OptiPFair with data",
    "hybrid PPM, distilled": "units, by OptiPFair with data, then distilled",
    "structured, int8": "units, then int8",
    "structured, distilled": "units, by the loss, then distilled",
    "structured, trained": "units, then trained",
    "structured, longer": "units, by the loss, then trained by `recipes/llm/smaller_longer.py`",
}
"""How a method is written. Tables list methods in this order."""

ORDER = list(LABELS)


class Quantity(NamedTuple):
    """How a measured number is shown: the heading of its column, the format, what follows it, and a factor."""

    heading: str
    form: str
    unit: str = ""
    factor: float = 1


def _in_percent(heading, form=".1f"):
    return Quantity(heading, form, " %", 100)


SHOWN = {
    "perplexity": Quantity("perplexity", "#.4g"),
    "perplexity_second": Quantity("perplexity on python-docs", "#.4g"),
    "top1": _in_percent("accuracy"),
    "divergence": Quantity("divergence", "#.3g"),
    "points": Quantity("points of accuracy", "+.1f"),
    "spearman": Quantity("score", ".2f"),
    "zeros_kept": _in_percent("zeros kept", ".3g"),
    "new_zeros": _in_percent("new zeros", ".3g"),
    "ratio": Quantity("time, as a ratio", ".2f"),
    "weights_mib": Quantity("MiB", ".1f"),
    "zstd_mib": Quantity("MiB after `zstd -3`", ".1f"),
    "prefill_1": Quantity("prefill, batch 1", ".2f"),
    "prefill_32": Quantity("prefill, batch 32", ".2f"),
    "decode_1": Quantity("decode, batch 1", ".2f"),
    "decode_32": Quantity("decode, batch 32", ".2f"),
    "images_1": Quantity("images, batch 1", ".2f"),
    "images_32": Quantity("images, batch 32", ".2f"),
    "sentences_1": Quantity("one sentence", ".2f"),
    "sentences_32": Quantity("32 sentences", ".2f"),
    "loads": Quantity("same text, speed of 1 / 16 requests", "d"),
    "requests_1": Quantity("1 request", ".2f"),
    "requests_16": Quantity("16 requests", ".2f"),
    "peak_mib": Quantity("peak memory, MiB", ".0f"),
    "peak_rss_mib": Quantity("peak of the process, MiB", ".0f"),
    "seconds": Quantity("seconds", "#.2g", " s"),
    "forward_seconds": Quantity("forward pass, s", ".2f"),
    "block_seconds": Quantity("while pruning, s", ".2f"),
    "solving_seconds": Quantity("solving, s", ".1f"),
    "before_seconds": Quantity("before, s", ".1f"),
    "read_gb": Quantity("GB read", ".2f"),
    "written_gb": Quantity("GB written", ".2f"),
    "passes": Quantity("forward passes", ".1f"),
    "solving": Quantity("solving, in windows", "#.2g"),
    "backward": Quantity("backward passes, in windows", "#.2g"),
    "total": Quantity("total for 128 windows, in forward passes", ".1f"),
    "hours": Quantity("hours of one core", "#.2g"),
    "beside_gib": Quantity("memory beside the weights, GiB", ".1f"),
    "memory_gib": Quantity("memory with the weights, GiB", ".1f"),
    "disk_gib": Quantity("memory from disk, GiB", ".1f"),
    "moved_gb": Quantity("GB read and written from disk", ".1f"),
}
"""The measured numbers that tables show, in the order of their columns."""


def number(result, name):
    """Return a measured number with its deviation or error, or an empty string if it was not measured."""
    if result is None or name not in result.measured:
        return ""
    quantity = SHOWN[name]
    value = quantity.factor * result.measured[name]
    shown = f"{value:{quantity.form}}".rstrip(".")
    if "e+" in shown:  # more digits before the point than the format has
        shown = f"{value:.0f}"

    for kind in ("deviation", "error"):
        if f"{name}_{kind}" in result.measured:
            digits = len(shown.partition(".")[2])
            shown += f" ± {quantity.factor * result.measured[f'{name}_{kind}']:.{digits}f}"
    return shown + quantity.unit


def markdown(headings, rows, align="---:"):
    """Return a table; `align` is that of all columns but the first."""
    lines = []
    for row in (headings, ["---"] + [align] * (len(headings) - 1), *rows):
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def label(result):
    """Return how the method is written."""
    return LABELS.get(result.method, result.method)


def title(result):
    """Return how the method is written, and its sparsity unless it is the dense model."""
    if result.goal == "dense":
        return label(result)
    return f"{label(result)}, {result.goal.removesuffix(' of units')}"


def lookup(results):
    """Return results by method and goal, of which no two have the same."""
    listed = list(results)
    table = {(result.method, result.goal): result for result in listed}
    assert len(table) == len(listed), listed
    return table


def in_order(results):
    """Return results by model, in the order of `LABELS`, of the number of calibration samples, and of sparsities."""

    def key(run):
        place = ORDER.index(run.method) if run.method in LABELS else -1
        return run.model, place, _samples(run), by_goal(run.goal)

    return sorted(results, key=key)


def by_goal(goal):
    """Order percentages before N:M."""
    return ":" in goal, goal


def _samples(run):
    return run.calibration.windows if run.calibration else 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a table shows.

    Names of rows and columns are templates: `{label}`, `{goal}` and `{title}` (both of them), `{samples}` for
    calibration, each part of `case` by its name, `{choices}` for all of them with their names, and `{run.model}`.

    Attributes:
        read: The name of a table of runs, or a function that returns runs.
        columns: The quantities of each column; its name may hold `{quantity}`. Numbers of one cell have commas between
            them. The dense model fills the columns of all goals.
        rows: Names of rows. Runs with the same name share a row.
        part: The line above a table. Runs with another line have another table.
        methods: Only these; by default all.
        goals: Likewise.
        cell: Returns the text of a run and a quantity.
        has_source: Whether data and notes are listed below.
    """

    read: str | Callable
    columns: dict[str, Sequence[str]]
    rows: str = "{title}"
    part: str = ""
    methods: Sequence[str] = ()
    goals: Sequence[str] = ()
    cell: Callable = number
    has_source: bool = True

    def __str__(self):
        """Return the text."""
        found = read_table(self.read) if isinstance(self.read, str) else self.read()
        runs = [run for run in in_order(found) if self._shows(run)]
        parts = {}
        for run in runs:
            parts.setdefault(_filled(self.part, run), []).append(run)
        blocks = []
        for line, members in parts.items():
            if line:
                blocks.append(f"{line}:")
            blocks.append(self._grid(members))
        if self.has_source:
            blocks += source(runs)
        return "\n\n".join(blocks)

    def _shows(self, run):
        has_method = not self.methods or run.method in self.methods
        return has_method and (not self.goals or run.goal in ("dense", *self.goals))

    def _grid(self, runs):
        """Return one table of cells."""
        goals = sorted({run.goal for run in runs} - {"dense"}, key=by_goal)
        table = {}
        headings = {}
        for columns, run in product(self.columns, runs):
            fills_all = run.goal == "dense" and "{goal}" in columns
            for goal in goals if fills_all else [run.goal]:
                row = table.setdefault(_filled(self.rows, run), {})
                for column, shown in self._cells(columns, run, goal).items():
                    headings[column] = None
                    row.setdefault(column, {})[shown] = None

        known = [*goals, *(quantity.heading for quantity in SHOWN.values())]
        ordered = [heading for heading in known if heading in headings]
        ordered += [heading for heading in headings if heading not in known]
        rows = []
        for name, row in table.items():
            if row:
                rows.append([name, *("; ".join(row.get(column, [])) for column in ordered)])
        return markdown([self._corner(), *ordered], rows)

    def _cells(self, columns, run, goal):
        """Return what a run shows in each column."""
        cells = {}
        for name in self.columns[columns]:
            shown = self.cell(run, name)
            if shown:
                column = _filled(columns, run, goal=goal, quantity=SHOWN[name].heading)
                cells.setdefault(column, []).append(shown)
        return {column: ", ".join(texts) for column, texts in cells.items()}

    def _corner(self):
        """Return the names of quantities that no heading says."""
        names = []
        for columns, quantities in self.columns.items():
            if "{quantity}" not in columns:
                names += [SHOWN[name].heading for name in quantities]
        return ", ".join(names)


def _filled(template, run, **more):
    """Return a template with what is known of a run. Unknown names are left out, with commas around them."""
    words = defaultdict(str, run.case)
    words |= {"run": run, "label": label(run), "goal": run.goal, "title": title(run)}
    words["samples"] = f"{_samples(run):,}"
    words["choices"] = ", ".join(f"{name} {value}" for name, value in run.case.items())
    return template.format_map(words | more).strip(", ")


USUAL = {  # docs/measured.md says it once
    "calibration": "16 windows of 512 tokens (c4_sample.txt)",
    "evaluation": "40 windows of 512 tokens (wikitext2_test.raw.txt)",
}


def source(results):
    """Return paragraphs that describe the data, unless they are the usual ones, and the notes of all results."""
    sentences = []
    for name, usual in USUAL.items():
        used = [getattr(result, name) for result in results]
        described = "; ".join(_distinct(_described(data) for data in used if data))
        if described not in ("", usual):
            sentences.append(f"{name.capitalize()}: {described}.")
    notes = _distinct(result.note for result in results)
    lines = [f"- {_noted(note, results)}{note}" for note in notes]
    return _distinct([" ".join(sentences), "\n".join(lines)])


def _described(data):
    tokens = f"windows of {data.length} tokens" if data.length else "samples"
    return f"{data.windows} {tokens} ({data.data})"


def _noted(note, results):
    """Name the runs that have a note, unless these are all or many."""
    noted = [run for run in results if run.note == note]
    if len(noted) == len(results):
        return ""
    names = _distinct(title(run) for run in noted)
    return f"{'; '.join(names)}: " if len(names) <= 4 else "Some runs: "


def _distinct(values):
    return list(dict.fromkeys(filter(None, values)))


def read_tables(*names):
    """Return the runs of several tables."""
    return [run for name in names for run in read_table(name)]


def read_worth(model=None):
    """Return the runs of the comparison; those whose quality another table has get its perplexity and seconds."""
    usual = lookup(read_drawn("methods"))
    results = []
    for run in read_drawn("worth"):
        if not run.measured.keys() & {"perplexity", "top1"}:
            measured = usual[run.method, run.goal].measured
            names = measured.keys() & {"perplexity", "perplexity_deviation", "seconds"}
            quality = {name: measured[name] for name in names}
            run = replace(run, measured=run.measured | quality)
        if model in (None, run.model):
            results.append(run)
    return results


def read_reference():
    """Return the runs of others and ours in the same setting; the usual table has some of ours."""
    runs = read_table("reference")
    known = {(run.code, *_cell(run)) for run in runs}
    asked = {_cell(run) for run in runs}
    for run in read_table("methods"):
        if _cell(run) in asked and (OURS, *_cell(run)) not in known:
            runs.append(run)
    return [run for run in runs if run.code != "ALPS"]


def _cell(run):
    return run.method, run.goal


def read_alps():
    """Return the runs of ALPS and our presets."""
    theirs = [run for run in read_table("reference") if run.code == "ALPS"]
    return theirs + read_table("methods")


def read_encoder():
    """Return the runs of a sentence encoder in float32, with means over draws of the calibration sentences."""
    usual = {"program": "onnxruntime", "numbers": "float32"}
    runs = []
    for run in read_tables("embedding", "draws"):
        if run.model == ENCODER and run.case in (usual, {"draw": run.case.get("draw")}):
            runs.append(run)
    return averaged(runs, _cell)


PAIRS = (  # methods whose accuracy is compared on the same images
    ("balanced", "sparsegpt"),
    ("best", "balanced"),
    ("thorough", "best"),
    ("balanced", "balanced at layer"),
    ("best", "best at layer"),
    ("thorough", "best+distil at layer"),
    ("best", "dense"),
    ("thorough", "dense"),
)


def read_pairs():
    """Return differences of the accuracy of two methods on the same images as runs, each with its standard error."""
    runs = {(*_cell(run), _samples(run)): run for run in read_tables("photos", "more_photos")}
    results = []
    for (first, second), run in product(PAIRS, runs.values()):
        beside = ("dense", "dense", 0) if second == "dense" else (second, run.goal, _samples(run))
        if run.method == first and beside in runs:
            pair = (run, runs[beside])
            correct = [[digit == "1" for digit in each.correct] for each in pair]
            points = 100.0 * np.subtract(*correct, dtype=float)
            measured = {"points": points.mean(), "points_error": sem(points)}
            name = f"{LABELS[first]} - {LABELS[second]}"
            results.append(replace(run, method=name, measured=measured, note=None))
    return results


def read_servers():
    """Return the runs in servers, each with the version of its server."""
    runs = []
    for run in read_table("serving"):
        server = run.case["server"]
        runs.append(replace(run, case={"server": f"{server} {run.versions[server]}"}))
    return runs


def served(run, _=None):
    """Return how a server runs a model."""
    if not run.measured["loads"]:
        if "Expected shape" in run.note:
            return "no: it has one width for all layers"
        return f"no: {run.note}"
    parts = ["yes"]
    same = run.measured["same_continuations"]
    if same < run.measured["continuations"]:
        parts.append(f"{same} of {run.measured['continuations']} equal")
    if "requests_16" in run.measured:
        parts.append(f"{number(run, 'requests_1')} / {number(run, 'requests_16')}")
    return ", ".join(parts)


PERPLEXITY = {"{goal}": ["perplexity"]}
WITH_SECONDS = {"{goal}": ["perplexity", "seconds"]}
EACH = {"{quantity}": list(SHOWN)}  # those that were not measured have no column
ACCURACY = {"{goal}": ["top1", "divergence"]}
GOALS = ("50 %", "60 %", "2:4")
MORE_GOALS = ("50 %", "60 %", "70 %", "2:4")
BY_SAMPLES = ("sparsegpt", "balanced", "best", "thorough")
DRAWN = ("dense", "wanda", "fast", "sparsegpt", "balanced", "best", "thorough")

METHODS = Table(
    read=partial(read_drawn, "methods"),
    columns=WITH_SECONDS,
    rows="{label}",
)
SERVERS = Table(
    read=read_servers,
    columns={"{server}": ["loads"]},
    rows="{run.model}, {title}",
    cell=served,
    has_source=False,
)
WORTH = Table(read=read_worth, columns=EACH, part="`{run.model}`")
RUNTIMES = Table(
    read="runtimes",
    columns=EACH,
    rows="{title}, {numbers}",
    part="`{run.model}` in {program}",
    has_source=False,
)
TABLES = {
    "methods": [METHODS, replace(METHODS, columns={"{goal}": ["peak_mib"]}, has_source=False)],
    "demo": [Table(read="demo", columns={"{on}": ["perplexity"]})],
    "reference": [
        Table(read=read_reference, columns={"{run.code}": ["perplexity"]}),
        Table(
            read=read_alps,
            columns={"{label}": ["perplexity"]},
            rows="{goal}",
            methods=("alps", "balanced", "best", "thorough"),
            goals=GOALS,
        ),
    ],
    "images": [
        Table(
            read="images",
            columns=ACCURACY,
            rows="{label}",
            part="`{run.model}` with the weights `{weights}`",
        )
    ],
    "photos": [Table(read=partial(read_drawn, "photos"), columns=ACCURACY, rows="{label}")],
    "more_photos": [
        Table(
            read=partial(read_tables, "more_photos", "photos"),
            columns=ACCURACY,
            rows="{label}, {samples} images",
            methods=BY_SAMPLES,
            goals=("50 %", "2:4"),
            has_source=False,
        )
    ],
    "paired_photos": [
        Table(
            read=read_pairs,
            columns={"{goal}": ["points"]},
            rows="{label}, {samples} images",
            has_source=False,
        )
    ],
    "costs": [Table(read="costs", columns=EACH, rows="{run.model}, {title}, {choices}")],
    "quantization": [
        Table(
            read="quantization",
            columns=EACH,
            rows="{title}, {quantizer}, {scheme}",
        )
    ],
    "windows": [
        Table(
            read=partial(read_tables, "windows", "methods"),
            columns=PERPLEXITY,
            rows="{label}, {samples} windows",
            methods=("wanda", *BY_SAMPLES, "thorough, 3 passes"),
            goals=MORE_GOALS,
            has_source=False,
        )
    ],
    "draws": [
        replace(
            METHODS,
            columns={"{goal}": ["perplexity", "perplexity_second"]},
            methods=DRAWN,
            goals=GOALS,
            has_source=False,
        )
    ],
    "encoder_draws": [
        Table(read=read_encoder, columns={"{quantity}": ["spearman"]}, has_source=False)
    ],
    "experts": [
        Table(
            read=lambda: averaged(read_table("experts")),
            columns=PERPLEXITY,
            rows="{label}",
        )
    ],
    "training": [
        Table(
            read="training",
            columns=WITH_SECONDS,
            rows="{label}, {choices}",
        )
    ],
    "worth": [WORTH],
    "worth_short": [
        Table(
            read=partial(read_worth, LANGUAGE_MODEL),
            columns={
                "{quantity}": ["perplexity", "weights_mib", "zstd_mib", "prefill_32", "decode_1"]
            },
            methods=("dense", "int8", "structured", "structured, fisher", "structured, longer"),
            goals=("25 % of units",),
            has_source=False,
        )
    ],
    "runtimes": [RUNTIMES],
    "runtimes embedding": [replace(RUNTIMES, read="embedding")],
    "serving": [SERVERS],
    "serving fisher": [replace(SERVERS, methods=("structured, fisher",))],
    "size_runs": [
        Table(
            read="sizes",
            columns=EACH,
            rows="{run.model}, {dtype}, {label}, {measures}, {windows} windows",
            has_source=False,
        )
    ],
    "at_your_size": [
        Table(
            read=extrapolated, columns=EACH, rows="{run.model}, {dtype}, {label}", has_source=False
        )
    ],
}
"""What each part of a page shows."""


def text(name):
    """Return the tables of a part."""
    return "\n\n".join(map(str, TABLES[name]))


def measured(*methods):
    """Return the perplexity and the seconds of methods."""
    shown = replace(METHODS, columns=WITH_SECONDS, methods=methods, goals=GOALS, has_source=False)
    return str(shown)
