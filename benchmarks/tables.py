"""The tables of the documentation, from the runs in benchmarks/results.

Each function in `FRAGMENTS` returns the text of one table with its source. `benchmarks/pages.py` writes it into the
pages that ask for it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import linear_regression, mean

import numpy as np
import pandas as pd
from result import OURS, Result, Samples, from_hexadecimal, read_table
from scipy.stats import sem

ROOT = Path(__file__).parents[1]
LABELS: Mapping[str, str] = {
    **{name: name for name in ("dense", "bfloat16", "int8", "int4", "magnitude")},
    "REAP": "REAP",
    "uses": "number of routed tokens",
    "norms": "norm of the weights",
    **{f"random, seed {seed}": f"at random, seed {seed}" for seed in range(3)},
    "wanda": "Wanda",
    "wanda, row": "Wanda, within a row",
    "wanda, layer": "Wanda, within a layer",
    "variant": "the paper's variant",
    "ria": "`RIA`",
    "owl": "Wanda with `OWL`",
    "fisher": "Wanda with `Fisher`",
    "wanda+permutation": "Wanda with a permutation",
    **{f"wanda_{name}": f'Wanda, `sequential="{name}"`' for name in ("none", "block", "layer")},
    "fast": "`fast`",
    **{
        f"wanda{more}": f"Wanda{more}" for more in (", 2 windows", ", 2 windows, each expert alone")
    },
    **{
        f"sparsegpt{more}": f"`SparseGPT`{more}"
        for more in ("", ", 2 windows", ", 2 windows, each expert alone")
    },
    "sparsegpt at layer": '`SparseGPT`, `sequential="layer"`',
    **{
        f"sparsegpt_{name}": f'`SparseGPT`, `sequential="{name}"`'
        for name in ("none", "block", "layer")
    },
    "refit": "`Refit`",
    "refit, biases kept": "`Refit`, biases kept",
    "alps": "ALPS",
    "admm": "`ADMM`",
    "balanced": "`balanced`",
    "balanced, biases kept": "`balanced`, biases kept",
    "balanced+permutation": "`balanced` with a permutation",
    "admm+reconstruct": "`admm`, then `Reconstruct`",
    "best-permutation": "`best` without its permutation",
    "best-row_weights": "`best` without row weights",
    "best+row_weights": "`best` with row weights",
    "best": "`best`",
    "best, biases kept": "`best`, biases kept",
    "best+reconstruct": "`best`, then `Reconstruct`",
    "wanda at layer": 'Wanda, `sequential="layer"`',
    "best-permutation at layer": '`best` without its permutation, `sequential="layer"`',
    "balanced at layer": '`balanced`, `sequential="layer"`',
    "best at layer": '`best`, `sequential="layer"`',
    "best+distil at layer": '`best`, `sequential="layer"`, then `Distill(blocks=False)`',
    "thorough": "`thorough`",
    "thorough, 3 passes": "`thorough`, always 3 passes",
    "fixed": "then `DistillFromDense`",
    "structured": "units",
    "structured, fisher": "units, by the loss",
    "structured, fisher parameters": "units, by the loss and their parameters",
    "structured, fisher macs": "units, by the loss and their multiply-adds",
    "structured, fisher seconds": "units, by the loss and their seconds",
    "GroupMagnitude": "units, by Torch-Pruning",
    "PPM": "units, by OptiPFair",
    "hybrid PPM": "units, by OptiPFair with data",
    "hybrid PPM, distilled": "units, by OptiPFair with data, then distilled",
    "structured, int8": "units, then int8",
    "structured, distilled": "units, by the loss, then distilled",
    "structured, longer": "units, by the loss, then trained by `recipes/llm/smaller_longer.py`",
}
"""How a method is written. Tables list methods in this order."""

SCALED = ("forward pass", "wanda", "sparsegpt", "admm")
Lookup = Mapping[tuple[str, str], Result]
Cell = Callable[[Result], str]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    """Return a table; `align` is that of all columns but the first."""
    lines = [headings, ["---", *[align] * (len(headings) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def grid(
    heading: str, cells: Iterable[tuple[str, str, str]], columns: Sequence[str] | None = None
) -> str:
    """Return a table of cells, each with its row and column, in the order of their first appearance.

    Raises:
        ValueError: Two different cells have the same place.
    """
    data = pd.DataFrame(cells, columns=["row", "column", "cell"]).drop_duplicates()
    table = data.pivot(index="row", columns="column", values="cell")
    table = table.reindex(
        index=data["row"].unique(), columns=columns or data["column"].unique()
    ).fillna("")
    return markdown([heading, *table.columns], table.reset_index().to_numpy().tolist())


def by_goals(heading: str, results: Iterable[Result], cell: Cell) -> str:
    """Return a table with a row for each method and a column for each goal, without the dense model."""
    pruned = in_order(result for result in results if result.method != "dense")
    return grid(heading, [(LABELS[r.method], r.goal, cell(r)) for r in pruned], goals_of(pruned))


def lookup(results: Iterable[Result]) -> Lookup:
    """Return results by method and goal.

    Raises:
        ValueError: Two of them have the same method and goal.
    """
    pairs = [((result.method, result.goal), result) for result in results]
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(
            f"A table must have one run in each cell, but has {sorted(key for key, _ in pairs)}."
        )
    return found


def in_order(results: Iterable[Result]) -> list[Result]:
    """Return results in the order of `LABELS`, and of their sparsities."""
    return sorted(results, key=lambda r: (list(LABELS).index(r.method), by_goal(r.goal)))


def goals_of(results: Iterable[Result]) -> list[str]:
    """Return the sparsities that were measured: percentages, then N:M."""
    return sorted({result.goal for result in results} - {"dense"}, key=by_goal)


def number(result: Result | None, quantity: str, form: str = ".4g", scale: float = 1) -> str:
    """Return a measured number, or an empty string if it was not measured."""
    measured = result.measured.get(quantity) if result else None
    return "" if measured is None else f"{scale * measured:{form}}"


def percent(result: Result | None, quantity: str, digits: int = 2) -> str:
    """Return a measured fraction in percent."""
    return number(result, quantity, f".{digits}%").replace("%", " %")


def seconds(result: Result | None) -> str:
    """Return measured seconds, with one decimal below ten."""
    measured = result.measured.get("seconds") if result else None
    return "" if measured is None else f"{measured:.{0 if measured >= 10 else 1}f}"


def perplexity(result: Result | None) -> str:
    """Return perplexity with four digits."""
    return (
        ""
        if result is None
        else f"{_perplexity(result):{'.0f' if _perplexity(result) >= 1000 else '#.4g'}}"
    )


def with_seconds(result: Result | None) -> str:
    """Return perplexity, and seconds if they were measured."""
    return perplexity(result) + (f", {taken} s" if (taken := seconds(result)) else "")


def _perplexity(result: Result) -> float:
    return result.measured["perplexity"]


def by_goal(goal: str) -> tuple[bool, str]:
    """Order percentages before N:M."""
    return ":" in goal, goal


def samples(data: Samples) -> str:
    """Describe calibration or evaluation data."""
    if not data.length:
        return f"{data.windows} {'' if data.data in ('digits', 'random images') else 'images of '}{data.data}"
    tokens = data.data if data.data == "random tokens" else f"tokens of {data.data}"
    return f"{data.windows} windows of {data.length} {tokens}"


USUAL = {  # docs/measured.md says it once
    "calibration": "16 windows of 512 tokens of c4_sample.txt",
    "evaluation": "40 windows of 512 tokens of wikitext2_test.raw.txt",
}


def source(results: Sequence[Result], data: bool = True, notes: bool = True) -> str:
    """Describe the data, unless they are the usual ones, and the notes of all results; begin with an empty line."""
    named = []
    for name, usual in USUAL.items() if data else ():
        used = _distinct(samples(own) for result in results if (own := getattr(result, name)))
        if used not in ([], [usual]):
            named.append(f"{name.capitalize()}: {'; '.join(used)}.")
    noted = [
        f"- {_noted(note, results)}{note}"
        for note in _distinct(result.note for result in results)
        if notes
    ]
    return "".join(f"\n\n{part}" for part in (" ".join(named), "\n".join(noted)) if part)


def _noted(note: str, results: Sequence[Result]) -> str:
    """Name the runs that have a note, unless these are all or many."""
    noted = [result for result in results if result.note == note]
    if len(noted) == len(results):
        return ""
    names = {f"{LABELS.get(result.method, result.method)}, {result.goal}": None for result in noted}
    return f"{'; '.join(names) if len(names) <= 4 else 'Some runs'}: "


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(filter(None, values)))


def methods() -> str:
    """Perplexity, seconds and memory of all methods with a language model."""
    results = in_order(read_table("methods"))
    goals = ["50 %", "60 %", "70 %", "2:4"]
    rows = []
    worse = []
    wanda = {result.goal: _perplexity(result) for result in results if result.method == "wanda"}
    for method, group in groupby(results, lambda result: result.method):
        runs = {run.goal: run for run in group if run.goal in ("dense", *goals)}
        cells = [perplexity(runs.get("dense", runs.get(goal))) for goal in goals]
        peaks = [run.measured["peak_mib"] for run in runs.values() if "peak_mib" in run.measured]
        times = ", ".join(filter(None, map(seconds, runs.values())))
        rows.append([LABELS[method], *cells, times, f"{max(peaks):.0f}" if peaks else ""])
        lost = [goal for goal, run in runs.items() if _perplexity(run) > wanda.get(goal, math.inf)]
        if lost and method != "magnitude":
            worse.append(f"{LABELS[method]} ({', '.join(lost)})")
    other = [
        f"{LABELS[r.method]} {perplexity(r)} at {r.goal}"
        for r in results
        if r.goal not in ("dense", *goals)
    ]
    sentences = f"Worse than Wanda: {', '.join(worse)}. Other sparsities: {', '.join(other)}."
    headings = ("perplexity", *goals, "seconds", "peak memory above the model, MiB")
    return "\n\n".join([markdown(headings, rows), sentences]) + source(results)


def demo() -> str:
    """Perplexity in `make demo` on two texts."""
    results = in_order(read_table("demo"))
    cells = [(LABELS[r.method], "sparsity", r.goal if r.sparsity else "0") for r in results]
    cells += [(LABELS[r.method], r.case["on"], perplexity(r)) for r in results]
    # sklearn-docs first.
    columns = [
        "sparsity",
        *sorted({r.case["on"] for r in results}, reverse=True),
    ]
    return grid("method", cells, columns) + source(results)


def reference() -> str:
    """Our perplexity beside that of other implementations."""
    results = in_order(read_table("reference"))
    more = lookup(read_table("methods"))
    ours = lookup(result for result in results if result.code == OURS)
    paper, alps = (
        [result for result in results if result.code == code] for code in ("locuslab/wanda", "ALPS")
    )
    rows = []
    for theirs in paper:
        own = ours.get((theirs.method, theirs.goal)) or more[theirs.method, theirs.goal]
        rows.append(
            [
                LABELS[theirs.method],
                theirs.goal.replace("dense", ""),
                perplexity(own),
                perplexity(theirs),
            ]
        )
    first = markdown(("method", "sparsity", "ours", "reference code"), rows)
    beside = [
        *alps,
        *(more[method, r.goal] for method in ("balanced", "best", "thorough") for r in alps),
    ]
    # Without seconds: those of ALPS are of a machine whose state was not recorded.
    second = grid("perplexity", [(r.goal, LABELS[r.method], perplexity(r)) for r in beside])
    notes = _distinct(f"- {result.code}: {result.note}" for result in (*paper, *alps))
    return "\n\n".join([first, second, "\n".join(notes)]) + source(list(ours.values()))


def images() -> str:
    """Accuracy of classifiers that were trained on digits, and the divergence from the dense predictions."""
    return _by_model(
        read_table("images"), lambda r: f"{percent(r, 'top1')} ({number(r, 'divergence', '#.2g')})"
    )


def photos() -> str:
    """Accuracy of classifiers with their weights, and the divergence from the dense predictions."""
    return _by_model(read_table("photos"), _accuracy_and_divergence)


def _accuracy_and_divergence(result: Result) -> str:
    return f"{percent(result, 'top1', 1)} ({number(result, 'divergence', '.3f')})"


def batch_norm() -> str:
    """Accuracy without and with the correction of BatchNorm statistics."""
    results = read_table("batch_norm")
    return _by_model(
        results, lambda r: f"{100 * r.measured['top1_uncorrected']:.1f} -> {percent(r, 'top1', 1)}"
    )


def _by_model(results: Sequence[Result], cell: Cell) -> str:
    """Return one table for each trained model."""
    parts = []
    for (weights, model), group in by_model(results).items():
        which = f"`{model}`" + f" with the weights `{weights}`" * bool(weights)
        (dense,) = (result for result in group if result.method == "dense")
        parts += [f"{which}, {percent(dense, 'top1')} dense:", by_goals("method", group, cell)]
    return "\n\n".join(parts) + source(results, notes=False)


def by_model(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return the results of each model by its weights and its name, first by the weights, longer names first."""

    def key(result: Result) -> tuple[str, int, str]:
        return result.case.get("weights", ""), -len(result.model), result.model

    groups = groupby(sorted(results, key=key), key)
    return {(weights, model): list(group) for (weights, _, model), group in groups}


def costs() -> str:
    """Cost of pruning as ratios to forward passes."""
    results = read_table("costs")
    passes = {
        "block": "two forward passes",
        "layer": "one forward pass",
        "none": "one forward pass",
    }
    rows = []
    for result in results:
        name = result.method
        if order := result.case.get("sequential"):
            name = f'Wanda, `sequential="{order}"` / {passes[order]}'
        elif name == "2:4 mask":
            name = f"2:4 mask of a {result.model} / `w.abs().mul_(s)`"
        rows.append([name, number(result, "ratio", ".2f"), number(result, "peak_mib", ".0f")])
    return markdown(("", "time, as a ratio", "peak memory, MiB"), rows) + source(results)


def scaling() -> str:
    """Processor seconds and peak memory by windows, blocks and width, with exponents."""
    results = read_table("scaling")
    parts = []
    for size in ("windows", "blocks", "width"):
        runs = sorted(
            (run for run in results if run.case["by"] == size), key=lambda run: run.case["value"]
        )
        for quantity, name, form in (
            ("processor_seconds", "seconds", ".2f"),
            ("peak_mib", "MiB", ".0f"),
        ):
            rows = []
            for method in SCALED:
                xs, ys = zip(
                    *[(r.case["value"], r.measured[quantity]) for r in runs if r.method == method],
                    strict=True,
                )
                # Not -0.0.
                slope = round(linear_regression(*map(np.log, (xs[-3:], ys[-3:]))).slope, 2) or 0.0
                rows.append(
                    [LABELS.get(method, method), *(f"{y:{form}}" for y in ys), f"{slope:.2f}"]
                )
            parts.append(markdown((f"{name} by {size}", *map(str, xs), "exponent"), rows))
    return "\n\n".join(parts) + source(results, data=False)


def finetuning() -> str:
    """Perplexity before and after fine-tuning."""
    results = sorted(read_table("finetuning"), key=lambda r: (by_goal(r.goal), r.method == "full"))
    cells = [(f"Wanda, {r.goal}", "pruned", number(r, "perplexity_before")) for r in results]
    cells += [(f"Wanda, {r.goal}", f"then `{r.method}`", perplexity(r)) for r in results]
    return grid("perplexity", cells) + source(results)


def keeping_zeros() -> str:
    """Cost of keeping zeros in a training step."""
    results = read_table("keeping_zeros")
    rows = []
    for result in results:
        adapters = result.case.get("adapters")
        name = f"`{result.method}` / {f'LoRA: {adapters}' if adapters else 'without: AdamW, all weights'}"
        memory = f"{number(result, 'peak_mib', '.0f')} / {number(result, 'plain_peak_mib', '.0f')}"
        rows.append([name, number(result, "ratio", ".2f"), memory])
    return markdown(("", "time, as a ratio", "peak memory, MiB"), rows) + source(results)


def quantization() -> str:
    """Zeros that quantizers keep."""
    order = ("none", "torchao", "bitsandbytes", "gguf", "compressed_tensors")
    rows = []
    none = {"quantizer": "none", "scheme": "none"}
    runs = [(result, none | result.case) for result in read_table("quantization")]
    runs.sort(key=lambda run: (run[0].sparsity, order.index(run[1]["quantizer"]), run[1]["scheme"]))
    for result, case in runs:
        unquantized = ["", f"none, {'pruned' if result.sparsity else 'dense'}"]
        shares = [number(result, name, ".3g", 100) for name in ("zeros_kept", "new_zeros")]
        named = unquantized if case == none else [*case.values()]
        rows.append(
            [*named, *(f"{share} %" if share else "" for share in shares), perplexity(result)]
        )
    headings = ("quantizer", "scheme", "zeros kept", "new zeros", "perplexity")
    return markdown(headings, rows) + source([result for result, _ in runs])


def tasks() -> str:
    """Zero-shot accuracy beside perplexity."""
    results = sorted(read_table("tasks"), key=_perplexity)
    cells = {}
    for r in results:
        row = LABELS[r.method] + ("" if r.method == "dense" else f", {r.goal}")
        cells.setdefault((row, "perplexity"), perplexity(r))
        for metric in {"acc", "acc_norm"} & r.measured.keys():
            shown = f"{100 * r.measured[metric]:.1f} ± {100 * r.measured[f'{metric}_error']:.1f} %"
            cells[row, f"{r.case['task']}, {metric}"] = shown
    columns = ["perplexity", *sorted({column for _, column in cells} - {"perplexity"})]
    return grid("", [(*place, cell) for place, cell in cells.items()], columns) + source(results)


def streaming() -> str:
    """Memory of pruning from disk."""
    results = sorted(
        read_table("streaming_memory"), key=lambda r: (r.model, r.method, r.case["layers"], r.name)
    )
    rows = []
    for result in results:
        case = {key: value for key, value in result.case.items() if key != "layers"}
        choices = ", ".join(
            [LABELS[result.method], result.goal, *(f"{key} {value}" for key, value in case.items())]
        )
        gigabytes = [number(result, name, ".2f") for name in ("read_gb", "written_gb")]
        peak = number(result, "peak_rss_mib", ".0f")
        rows.append([result.model, choices, str(result.case["layers"]), peak, *gigabytes])
    headings = ("model", "choices", "layers", "peak, MiB", "GB read", "GB written")
    return markdown(headings, rows) + source(results)


def windows() -> str:
    """Perplexity by the number of calibration windows."""
    return _by_number(
        "perplexity", "windows", read_table("windows"), read_table("methods"), perplexity
    )


def more_photos() -> str:
    """Accuracy and divergence of classifiers with their weights, by the number of calibration images."""
    more = [run for run in read_table("more_photos") if " at layer" not in run.method]
    return _by_number(
        "accuracy (divergence)", "images", more, read_table("photos"), _accuracy_and_divergence
    )


def _by_number(
    heading: str, noun: str, more: Sequence[Result], usual: Sequence[Result], cell: Cell
) -> str:
    """Return a table by method and number of calibration samples."""
    methods = {run.method for run in more if run.calibration}
    goals = goals_of(more)
    used = [run for run in (*more, *usual) if run.method in methods and run.goal in goals]
    ordered = sorted(used, key=lambda run: (list(LABELS).index(run.method), _count(run)))
    cells = [
        (f"{LABELS[run.method]}, {_count(run):,} {noun}", run.goal, cell(run)) for run in ordered
    ]
    return grid(heading, cells, goals)


def _count(run: Result) -> int:
    assert run.calibration
    return run.calibration.windows or 0


def paired_photos() -> str:
    """Differences of the accuracy between presets on the same images, each with its standard error."""
    results = [*read_table("photos"), *read_table("more_photos")]
    (dense,) = {run.correct: run for run in results if run.method == "dense"}.values()
    found = {(run.method, run.goal, _count(run)): run for run in results if run.calibration}
    steps = [("balanced", "sparsegpt"), ("best", "balanced"), ("thorough", "best")]
    others = [(name, f"{name} at layer") for name in ("balanced", "best")] + [
        ("thorough", "best+distil at layer")
    ]
    cells = []
    for method, other in [*steps, *others, ("best", "dense"), ("thorough", "dense")]:
        for (name, goal, count), run in sorted(found.items(), key=lambda item: item[0][2]):
            beside = dense if other == "dense" else found.get((other, goal, count))
            if name == method and beside:
                cells.append(
                    (
                        f"{LABELS[method]} - {LABELS[other]}, {count:,} images",
                        goal,
                        _paired(run, beside),
                    )
                )
    return grid("points of accuracy (standard error)", cells, goals_of(found.values()))


def _paired(*runs: Result) -> str:
    """Return the difference of two accuracies on the same images in points, and its standard error."""
    first, second = (from_hexadecimal(run.correct, run.evaluation.windows) for run in runs)
    differences = 100.0 * np.subtract(first, second, dtype=float)
    return f"{differences.mean():+.1f} ({sem(differences):.1f})"


def draws() -> str:
    """Mean perplexity over draws of the calibration windows, with the lowest and the highest, on two texts."""
    more = in_order(read_table("draws"))
    drawn = {(run.method, run.goal) for run in more}
    runs = [*(run for run in read_table("methods") if (run.method, run.goal) in drawn), *more]
    goals = goals_of(more)
    cells = []
    for method in dict.fromkeys(run.method for run in more):
        for quantity, text in (("perplexity", "WikiText-2"), ("perplexity_second", "python-docs")):
            for goal in goals:
                own = [
                    run.measured.get(quantity)
                    for run in runs
                    if run.method == method and run.goal in (goal, "dense")
                ]
                cells.append(
                    (f"{LABELS[method]}, {text}", goal, mean_and_range([*filter(None, own)]))
                )
    return grid("perplexity", cells, goals)


def mean_and_range(values: Sequence[float]) -> str:
    """Return the mean, with the lowest and the highest value unless all look the same."""
    if not values:
        return ""
    low, middle, high = (f"{value:#.4g}" for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def own_text() -> str:
    """Perplexity after calibration with web text, and with text that the dense model writes."""
    results = [r for r in read_table("own_text") if r.method != "dense"]
    goals = {(result.method, result.goal) for result in results}
    web = [result for result in read_table("methods") if (result.method, result.goal) in goals]
    texts = (("web text", web), ("text by the dense model", results))
    cells = [
        (f"{LABELS[r.method]}, {r.goal}", text, perplexity(r))
        for text, runs in texts
        for r in in_order(runs)
    ]
    return grid("perplexity", cells) + source([*results, *web])


def experts() -> str:
    """Perplexity of a small mixture without some of its experts."""
    results = read_table("experts")
    dense = perplexity(next(result for result in results if result.method == "dense"))
    return by_goals(f"perplexity (dense {dense})", results, perplexity) + source(results)


def training() -> str:
    """Perplexity and seconds of models that are trained on after pruning."""

    def row(result: Result) -> str:
        windows, steps = (result.case.get(name, 0) for name in ("windows", "steps"))
        return LABELS[result.method] + (f", {windows} windows in {steps} steps" if windows else "")

    results = sorted(
        read_table("training"), key=lambda r: (r.case.get("windows", 0), r.case.get("steps", 0))
    )
    usual = [result for result in results if result.case.get("text") in (None, "both")]
    first = grid(
        "perplexity, seconds of training",
        [(row(r), r.goal, with_seconds(r)) for r in usual],
        goals_of(usual),
    )
    texts = {"web": "web text", "own": "text by the dense model"}
    second = grid(
        "perplexity by training text",
        [
            (f"{row(r)}, {r.goal}", texts[r.case["text"]], perplexity(r))
            for r in results
            if r.case.get("text") in texts
        ],
        [*texts.values()],
    )
    names = _distinct(
        result.calibration.data for result in results if result.case.get("text") == "both"
    )
    return "\n\n".join(
        [first, f"Trained on windows of 512 tokens of {'; '.join(names)}.", second]
    ) + source(results, data=False)


WORTH: Mapping[str, tuple[str, Cell]] = {
    "perplexity": ("perplexity", perplexity),
    "top1": ("accuracy", lambda result: percent(result, "top1", 1)),
    "weights_mib": ("MiB", lambda result: number(result, "weights_mib", ".1f")),
    "zstd_mib": ("MiB after `zstd -3`", lambda result: number(result, "zstd_mib", ".1f")),
    **{
        f"{what}_{size}": (
            f"{what}, batch {size}",
            partial(number, quantity=f"{what}_{size}", form=".2f"),
        )
        for what in ("prefill", "decode", "images")
        for size in (1, 32)
    },
    "peak_mib": ("activations, MiB", lambda result: number(result, "peak_mib", ".0f")),
    "seconds": ("seconds to make", seconds),
}
"""Columns of the comparison of what makes a model smaller or faster: headings and cells."""


def worth() -> str:
    """Quality, size and speed of fewer bits, scattered zeros and fewer units."""
    groups = by_model(read_worth())
    return "\n\n".join(
        f"`{model}`:\n\n{worth_table(group, list(WORTH))}{source(group)}"
        for (_, model), group in groups.items()
    )


def read_worth() -> list[Result]:
    """Return the runs of the comparison; those whose quality another table has get its perplexity and seconds."""
    usual = lookup(read_table("methods"))
    results = []
    for result in read_table("worth"):
        if not result.measured.keys() & {"perplexity", "top1"}:
            quality = {
                name: usual[result.method, result.goal].measured[name]
                for name in ("perplexity", "seconds")
            }
            result = replace(result, measured=result.measured | quality)
        results.append(result)
    return results


def worth_table(results: Sequence[Result], columns: Sequence[str]) -> str:
    """Return the rows of one model, with the columns that were measured."""
    shown = [WORTH[name] for name in columns if any(name in result.measured for result in results)]
    ordered = sorted(in_order(results), key=lambda result: result.pattern == "structured")
    rows = []
    for result in ordered:
        cells = [cell(result) for _, cell in shown]
        rows.append([_worth_name(result), _fewer_parameters(result, results), *cells])
    return markdown(("", "fewer parameters", *(heading for heading, _ in shown)), rows)


def _fewer_parameters(result: Result, results: Sequence[Result]) -> str:
    """Return the share of the parameters that left with hidden units: that of the bytes in float32."""
    if result.pattern != "structured":
        return ""

    def size(method: str, goal: str) -> float:
        (mib,) = {
            run.measured["weights_mib"]
            for run in results
            if (run.method, run.goal, run.case.get("numbers", "float32"))
            == (method, goal, "float32")
        }
        return mib

    left = size(result.method.removesuffix(", int8"), result.goal) / size("dense", "dense")
    return f"{1 - left:.0%}".replace("%", " %")


def runtimes() -> str:
    """Quality, size and speed of fewer bits and fewer units, in programs that run models on a CPU."""
    runs = sorted(
        read_table("runtimes"),
        key=lambda r: (r.model, r.case["program"], -r.measured["weights_mib"]),
    )
    groups = groupby(runs, lambda r: f"`{r.model}` in {r.case['program']}")
    return "\n\n".join(
        f"{name}:\n\n{worth_table(list(group), list(WORTH))}" for name, group in groups
    )


def _worth_name(result: Result) -> str:
    goal = "" if result.goal == "dense" else f" {result.goal.removesuffix(' of units')}"
    name, _, more = LABELS[result.method].partition(", ")
    return ", ".join(filter(None, (f"{name}{goal}", more, result.case.get("numbers"))))


FRAGMENTS: Mapping[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        *(methods, demo, reference, images, photos, batch_norm, costs, scaling, finetuning),
        *(keeping_zeros, quantization, tasks, streaming, windows, more_photos, paired_photos),
        *(draws, own_text, experts, training, worth, runtimes),
    )
}
