"""The tables of the documentation, from the runs in benchmarks/results.

Each function in `FRAGMENTS` returns the text of one table with its source. `benchmarks/pages.py` writes it into the
pages that ask for it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from result import OURS, Result, Samples, from_hexadecimal, read_table

ROOT = Path(__file__).parents[1]
LABELS: Mapping[str, str] = {
    "dense": "dense",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "wanda, row": "Wanda, within a row",
    "wanda, layer": "Wanda, within a layer",
    "variant": "the paper's variant",
    "ria": "`RIA`",
    "owl": "Wanda with `OWL`",
    "alpha": "Wanda with `AlphaPruning`",
    "fisher": "Wanda with `Fisher`",
    "wanda+permutation": "Wanda with a permutation",
    **{f"wanda_{name}": f'Wanda, `sequential="{name}"`' for name in ("none", "block", "layer")},
    "fast": "`fast`",
    "sparsegpt": "`SparseGPT`",
    "sparsegpt at layer": '`SparseGPT`, `sequential="layer"`',
    **{f"sparsegpt_{name}": f'`SparseGPT`, `sequential="{name}"`' for name in ("none", "block", "layer")},
    "sparsegpt by hand": "plain SparseGPT",
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
    "best+distil at layer": '`best`, `sequential="layer"`, then `Distil(blocks=False)`',
    "thorough": "`thorough`",
    "thorough, 3 passes": "`thorough`, always 3 passes",
    "fixed": "then `DistillFromDense`",
    "trained longer": "dense, trained as long",
    "structured": "units",
    "structured, fisher": "units, by the loss",
    "GroupMagnitude": "units, by Torch-Pruning",
    "structured, int8": "units, then int8",
    "structured, distilled": "units, by the loss, then distilled",
    "structured, 10 epochs": "units, then 10 epochs",
}
"""How a method is written. Tables list methods in this order."""

Row = Sequence[str]
Lookup = Mapping[tuple[str, str], Result]
Cell = Callable[[Result | None], str]


def markdown(headings: Row, rows: Iterable[Row]) -> str:
    """Return a table with all columns but the first aligned to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lookup(results: Iterable[Result]) -> Lookup:
    """Return results by method and goal.

    Raises:
        ValueError: Two of them have the same method and goal.
    """
    found: dict[tuple[str, str], Result] = {}
    for result in results:
        key = result.method, result.goal
        if key in found:
            raise ValueError(
                f"A table must have one run in each cell, but {result.name} and {found[key].name} share one."
            )
        found[key] = result
    return found


def methods_of(found: Lookup) -> list[str]:
    """Return the methods in the order of `LABELS`, without the dense model."""
    return sorted({method for method, _ in found} - {"dense"}, key=list(LABELS).index)


def goals_of(results: Iterable[Result]) -> list[str]:
    """Return the sparsities that were measured: percentages, then N:M."""
    return sorted({result.goal for result in results} - {"dense"}, key=by_goal)


def number(result: Result | None, quantity: str, form: str = ".4g") -> str:
    """Return a measured number, or an empty string if it was not measured."""
    measured = result.measured.get(quantity) if result else None
    return "" if measured is None else f"{measured:{form}}"


def percent(result: Result | None, quantity: str, digits: int = 2) -> str:
    """Return a measured fraction in percent."""
    return number(result, quantity, f".{digits}%").replace("%", " %")


def seconds(result: Result | None) -> str:
    """Return measured seconds, with one decimal below ten."""
    measured = result.measured.get("seconds") if result else None
    return "" if measured is None else f"{measured:.{0 if measured >= 10 else 1}f}"


def perplexity(result: Result | None) -> str:
    """Return perplexity with four digits."""
    return "" if result is None else f"{_perplexity(result):{'.0f' if _perplexity(result) >= 1000 else '#.4g'}}"


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


def source(results: Sequence[Result], data: bool = True) -> str:
    """Describe the data, unless they are the usual ones, and the notes of all results; begin with an empty line."""
    named = []
    for name, usual in USUAL.items() if data else ():
        used = _distinct(samples(own) for result in results if (own := getattr(result, name)))
        if used not in ([], [usual]):
            named.append(f"{name.capitalize()}: {'; '.join(used)}.")
    notes = [f"- {_noted(note, results)}{note}" for note in _distinct(result.note for result in results)]
    return "".join(f"\n\n{part}" for part in (" ".join(named), "\n".join(notes)) if part)


def _noted(note: str, results: Sequence[Result]) -> str:
    """Name the runs that have a note, unless these are all or many."""
    noted = [result for result in results if result.note == note]
    if len(noted) == len(results):
        return ""
    names = {f"{LABELS.get(result.method, result.method)}, {result.goal}": None for result in noted}
    return f"{'; '.join(names) if len(names) <= 4 else 'Some runs'}: "


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(filter(None, values)))


def all_methods() -> str:
    """Perplexity, seconds and memory of all methods with a language model."""
    results, goals = read_table("methods"), ("50 %", "60 %", "70 %", "2:4")
    found = lookup(results)
    rows = [["dense", *[perplexity(found["dense", "dense"])] * len(goals), "", ""]]
    worse = []
    for method in methods_of(found):
        cells = [found.get((method, goal)) for goal in goals]
        times = ", ".join(filter(None, map(seconds, cells)))
        peaks = [cell.measured["peak_mib"] for cell in cells if cell and "peak_mib" in cell.measured]
        rows.append([LABELS[method], *(perplexity(cell) for cell in cells), times])
        rows[-1].append(f"{max(peaks):.0f}" if peaks else "")
        lost = [cell.goal for cell in cells if cell and _perplexity(cell) > _perplexity(found["wanda", cell.goal])]
        if lost and method != "magnitude":
            worse.append(f"{LABELS[method]} ({', '.join(lost)})")
    others = [result for result in results if result.goal not in ("dense", *goals)]
    others = sorted(others, key=lambda result: by_goal(result.goal))
    other = [f"{LABELS[result.method]} {perplexity(result)} at {result.goal}" for result in others]
    headings = ("perplexity", *goals, "seconds", "peak memory above the model, MiB")
    sentences = f"Worse than Wanda: {', '.join(worse)}. Other sparsities: {', '.join(other)}."
    return "\n\n".join([markdown(headings, rows), sentences]) + source(results)


def _perplexity(result: Result) -> float:
    return result.measured["perplexity"]


def demo() -> str:
    """Perplexity in `make demo` on two texts."""
    results = read_table("demo")
    cells = {(r.method, r.case["on"]): r for r in results}
    texts = sorted({text for _, text in cells}, reverse=True)  # sklearn-docs first
    rows = []
    for method in (each for each in LABELS if (each, texts[0]) in cells):
        found = [cells[method, text] for text in texts]
        rows.append([LABELS[method], found[0].goal if found[0].sparsity else "0", *map(perplexity, found)])
    return markdown(("method", "sparsity", *texts), rows) + source(results)


def reference() -> str:
    """Our perplexity beside that of other implementations."""
    results = read_table("reference")
    ours, paper = (lookup(r for r in results if r.code == code) for code in (OURS, "locuslab/wanda"))
    more = lookup(read_table("methods"))
    rows = []
    for key in sorted(paper, key=lambda key: (list(LABELS).index(key[0]), by_goal(key[1]))):
        own = ours.get(key) or more[key]
        goal = "" if key[0] == "dense" else key[1]
        rows.append([LABELS[key[0]], goal, perplexity(own), perplexity(paper[key])])
    first = markdown(("method", "sparsity", "ours", "reference code"), rows)
    alps = sorted((r for r in results if r.code == "ALPS"), key=lambda r: by_goal(r.goal))
    rows = []
    for result in alps:
        own = [more[method, result.goal] for method in ("balanced", "best", "thorough")]
        rows.append([result.goal, *(f"{perplexity(r)}, {seconds(r)} s" for r in (result, *own))])
    second = markdown(("perplexity, seconds", "ALPS", "`balanced`", "`best`", "`thorough`"), rows)
    theirs = _distinct(f"- {result.code}: {result.note}" for result in (*paper.values(), *alps))
    return "\n\n".join([first, second, "\n".join(theirs)]) + source(list(ours.values()))


def images() -> str:
    """Accuracy of image classifiers, and where it was measured, the divergence from the dense predictions."""

    def cell(result: Result | None) -> str:
        differs = number(result, "divergence", "#.2g")
        return percent(result, "top1") + (f" ({differs})" if differs else "")

    return _by_model(read_table("images"), cell, ("50 %", "70 %", "80 %", "90 %", "2:4"))


def photos() -> str:
    """Accuracy of classifiers with their weights, and the divergence from the dense predictions."""
    results = read_table("photos")
    return _by_model(results, _accuracy_and_divergence, goals_of(results))


def _accuracy_and_divergence(result: Result | None) -> str:
    return f"{percent(result, 'top1', 1)} ({number(result, 'divergence', '.3f')})" if result else ""


def batch_norm() -> str:
    """Accuracy without and with the correction of BatchNorm statistics."""

    def cell(result: Result | None) -> str:
        without = number(result, "top1_uncorrected", ".1%").rstrip("%")
        return f"{without} -> {percent(result, 'top1', 1)}" if result else ""

    return _by_model(read_table("batch_norm"), cell, ("50 %", "60 %", "70 %", "2:4"))


def _by_model(results: Sequence[Result], cell: Cell, goals: Row) -> str:
    """Return one table for each trained model: first by the weights, then by name."""
    groups = defaultdict(list)
    for result in results:
        groups[result.case.get("weights", ""), result.model].append(result)
    parts = []
    for (weights, model), group in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[0][1]))):
        found = lookup(group)
        rows = [[LABELS[name], *(cell(found.get((name, goal))) for goal in goals)] for name in methods_of(found)]
        which = f"`{model}`" + f" with the weights `{weights}`" * bool(weights)
        title = f"{which}, {percent(found['dense', 'dense'], 'top1')} dense:"
        parts += [title, markdown(("method", *goals), rows)]
    return "\n\n".join(parts) + source(results)


def costs() -> str:
    """Cost of pruning as ratios to forward passes."""
    results = read_table("costs")
    passes = {"block": "two forward passes", "layer": "one forward pass", "none": "one forward pass"}
    rows = []
    for result in results:
        name = result.method
        if order := result.case.get("sequential"):
            name = f'Wanda, `sequential="{order}"` / {passes[order]}'
        elif name == "structured":
            name = f"{result.goal} to zero / one forward pass"
        elif name == "2:4 mask":
            name = f"2:4 mask of a {result.model} / `w.abs().mul_(s)`"
        rows.append([name, number(result, "ratio", ".2f"), number(result, "peak_mib", ".0f")])
    return markdown(("", "time, as a ratio", "peak memory, MiB"), rows) + source(results)


def image_costs() -> str:
    """Cost of pruning image models as ratios to a forward pass."""
    results = read_table("image_costs")
    found = {(result.method, result.model): result for result in results}
    models = _distinct(result.model for result in results)
    rows = []
    for method in _distinct(["forward pass", *(result.method for result in results)]):
        form = (lambda r: f"{seconds(r)} s") if method == "forward pass" else (lambda r: number(r, "ratio", ".2f"))
        rows.append([method, *(form(found[method, model]) for model in models)])
    return markdown(("", *models), rows) + source(results)


def scaling() -> str:
    """Processor seconds and peak memory by windows, blocks and width, with exponents."""
    results, parts = read_table("scaling"), []
    for size in ("windows", "blocks", "width"):
        for quantity, name, form in (("processor_seconds", "seconds", ".2f"), ("peak_mib", "MiB", ".0f")):
            runs = {(r.method, r.case["value"]): r for r in results if r.case["by"] == size}
            values = sorted({value for _, value in runs})
            rows = []
            for method in SCALED:
                points = [(value, runs[method, value].measured[quantity]) for value in values]
                slope = round(exponent(points), 2) or 0.0  # not -0.0
                rows.append([LABELS.get(method, method), *(f"{y:{form}}" for _, y in points), f"{slope:.2f}"])
            parts.append(markdown((f"{name} by {size}", *map(str, values), "exponent"), rows))
    return "\n\n".join(parts) + source(results, data=False)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of a line through the last three points, fitted to their logarithms."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points[-3:], strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


SCALED = ("forward pass", "wanda", "sparsegpt", "admm")


def processes() -> str:
    """Pruning in several processes: seconds, memory of a process, and masks."""
    order = [("one process", 1), *((strategy, count) for count in (2, 4) for strategy in ("DDP", "FSDP2"))]
    found = {(r.method, r.case["strategy"], r.case["processes"]): r for r in read_table("processes")}
    rows = []
    for method in sorted({method for method, *_ in found}, key=list(LABELS).index):
        for strategy, count in order:
            result = found[method, strategy, count]
            ratio, differ = "", ""
            if strategy == "FSDP2":
                ratio = f"{result.measured['seconds'] / found[method, 'DDP', count].measured['seconds']:.2f}"
            if count > 1:
                fractions = (result.measured[name] for name in ("first_mask_difference", "mask_difference"))
                differ = ", ".join(f"{100 * fraction:.2g} %" for fraction in fractions)
            memory = [number(result, name, ".0f") for name in ("weights_mib", "plain_peak_mib", "peak_mib")]
            name = f"{LABELS[method]}, {strategy if count == 1 else f'{count} x {strategy}'}"
            rows.append([name, seconds(result), ratio, *memory, differ])
    headings = (
        "seconds",
        "FSDP2 / DDP",
        "weights, MiB",
        "forward pass, MiB",
        "pruning, MiB",
        "mask entries that differ",
    )
    return markdown(("", *headings), rows) + source([*found.values()])


def finetuning() -> str:
    """Perplexity before and after fine-tuning."""
    results = read_table("finetuning")
    rows = []
    for goal in ("50 %", "2:4"):
        own = {result.method: result for result in results if result.goal == goal}
        tuned = [perplexity(own[name]) for name in ("keep-zeros-lora", "full")]
        rows.append([f"Wanda, {goal}", number(own["full"], "perplexity_before"), *tuned])
    headings = ("perplexity", "pruned", "then `keep-zeros-lora`", "then `full`")
    return markdown(headings, rows) + source(results)


def keeping_zeros() -> str:
    """Cost of keeping zeros in a training step."""
    results, rows = read_table("keeping_zeros"), []
    for result in results:
        adapters = result.case.get("adapters")
        name = f"`{result.method}` / {f'LoRA: {adapters}' if adapters else 'without: AdamW, all weights'}"
        memory = f"{number(result, 'peak_mib', '.0f')} / {number(result, 'plain_peak_mib', '.0f')}"
        rows.append([name, number(result, "ratio", ".2f"), memory])
    return markdown(("", "time, as a ratio", "peak memory, MiB"), rows) + source(results)


def sparsegpt() -> str:
    """Our SparseGPT against a plain implementation."""
    results, goals = read_table("sparsegpt"), ("50 %", "60 %", "2:4")
    found, rows = lookup(results), []
    for method in ("sparsegpt by hand", "sparsegpt", "sparsegpt at layer", "balanced"):
        cells = [found[method, goal] for goal in goals]
        shown = [f"{perplexity(c)}, {seconds(c)} s" for c in cells]
        rows.append([LABELS[method], *shown, ", ".join(filter(None, (number(c, "ratio", ".2f") for c in cells)))])
    return markdown(("perplexity, seconds", *goals, "seconds / plain"), rows) + source(results)


def file_size() -> str:
    """Sizes of files that zstd has compressed."""
    results = read_table("file_size")
    results.sort(key=lambda r: (r.model, r.case["dtype"], r.goal != "dense", by_goal(r.goal)))
    rows = [
        [f"{r.model}, {r.case['dtype']}", r.goal, number(r, "zstd_3", ".3f"), number(r, "zstd_19", ".3f")]
        for r in results
    ]
    headings = ("bytes / bytes of the dense file", "zeros", "`zstd -3`", "`zstd -19`")
    return markdown(headings, rows) + source(results)


def quantization() -> str:
    """Zeros that quantizers keep."""
    results = read_table("quantization")
    order = {"torchao": 1, "bitsandbytes": 2, "gguf": 3, "compressed_tensors": 4}

    def key(result: Result) -> tuple[bool, int, bool]:
        return result.method != "dense", order.get(result.case.get("quantizer", ""), 0), result.case.get("scheme", "")

    rows = []
    for result in sorted(results, key=key):
        quantizer, scheme = (result.case.get(name, "none") for name in ("quantizer", "scheme"))
        if quantizer == "none":
            quantizer, scheme = "", f"none, {'dense' if result.method == 'dense' else 'pruned'}"
        fractions = [result.measured.get(name) for name in ("zeros_kept", "new_zeros")]
        shown = ["" if fraction is None else f"{100 * fraction:.3g} %" for fraction in fractions]
        rows.append([quantizer, scheme, *shown, perplexity(result)])
    return markdown(("quantizer", "scheme", "zeros kept", "new zeros", "perplexity"), rows) + source(results)


def tasks() -> str:
    """Zero-shot accuracy beside perplexity."""
    results = read_table("tasks")
    found: dict[tuple[str, str], dict[str, Result]] = defaultdict(dict)
    for result in sorted(results, key=_perplexity):
        found[result.method, result.goal][result.case["task"]] = result
    columns = [
        (task, metric)
        for task in _distinct(result.case["task"] for result in results)
        for metric in ("acc", "acc_norm")
        if any(result.case["task"] == task and metric in result.measured for result in results)
    ]

    def accuracy(result: Result | None, metric: str) -> str:
        if result is None:
            return ""
        return f"{100 * result.measured[metric]:.1f} ± {100 * result.measured[f'{metric}_error']:.1f} %"

    rows = []
    for (method, goal), own in found.items():
        label = LABELS[method] + ("" if method == "dense" else f", {goal}")
        cells = [accuracy(own.get(task), metric) for task, metric in columns]
        rows.append([label, perplexity(next(iter(own.values()))), *cells])
    headings = ("", "perplexity", *(f"{task}, {metric}" for task, metric in columns))
    return markdown(headings, rows) + source(results)


def streaming() -> str:
    """Memory and seconds of pruning from disk."""
    results = sorted(read_table("streaming_memory"), key=lambda r: (r.model, r.method, r.case["layers"], r.name))
    rows = []
    for result in results:
        case = {key: value for key, value in result.case.items() if key != "layers"}
        choices = ", ".join([LABELS[result.method], result.goal, *(f"{key} {value}" for key, value in case.items())])
        gigabytes = [number(result, name, ".2f") for name in ("read_gb", "written_gb")]
        peak = number(result, "peak_rss_mib", ".0f")
        rows.append([result.model, choices, str(result.case["layers"]), peak, *gigabytes])
    headings = ("model", "choices", "layers", "peak, MiB", "GB read", "GB written")
    parts = [markdown(headings, rows) + source(results)]
    results = read_table("streaming_seconds")
    quantities = {"seconds": ".1f", "plain_seconds": ".1f", "ratio": ".2f"}
    rows = [
        [f"{r.model}, {LABELS[r.method]}, {r.case['sequential']}", *(number(r, q, f) for q, f in quantities.items())]
        for r in results
    ]
    return "\n\n".join([*parts, markdown(("seconds", "from disk", "in memory", "ratio"), rows)]) + source(results)


def windows() -> str:
    """Perplexity by the number of calibration windows."""
    return _by_number("perplexity", "windows", read_table("windows"), read_table("methods"), perplexity)


def more_photos() -> str:
    """Accuracy and divergence of classifiers with their weights, by the number of calibration images."""
    more = [run for run in read_table("more_photos") if " at layer" not in run.method]
    usual = read_table("photos")
    return _by_number("accuracy (divergence)", "images", more, usual, _accuracy_and_divergence)


def paired_photos() -> str:
    """Differences of the accuracy between presets on the same images, each with its standard error."""
    results = [*read_table("photos"), *read_table("more_photos")]
    (dense,) = {run.correct: run for run in results if run.method == "dense"}.values()
    found = {(run.method, run.goal, run.calibration.windows): run for run in results if run.calibration}
    goals = goals_of(found.values())
    steps = [("balanced", "sparsegpt"), ("best", "balanced"), ("thorough", "best")]
    others = [(name, f"{name} at layer") for name in ("balanced", "best")] + [("thorough", "best+distil at layer")]
    pairs = [*steps, *others, ("best", ""), ("thorough", "")]
    rows = []
    for method, other in pairs:
        for count in sorted({count for name, _, count in found if name == method and count}):
            runs = [
                (found.get((method, goal, count)), found.get((other, goal, count)) if other else dense)
                for goal in goals
            ]
            label = f"{LABELS[method]} - {LABELS[other or 'dense']}, {count:,} images"
            if any(None not in pair for pair in runs):
                rows.append([label, *(_paired(*pair) if None not in pair else "" for pair in runs)])
    return markdown(("points of accuracy (standard error)", *goals), rows)


def _paired(*runs: Result | None) -> str:
    """Return the difference of two accuracies on the same images in points, and its standard error."""
    first, second = (_is_correct(run) for run in runs)
    differences = [100 * (a - b) for a, b in zip(first, second, strict=True)]
    return f"{mean(differences):+.1f} ({stdev(differences) / math.sqrt(len(differences)):.1f})"


def _is_correct(run: Result | None) -> list[bool]:
    assert run
    assert run.correct
    assert run.evaluation
    assert run.evaluation.windows
    return from_hexadecimal(run.correct, run.evaluation.windows)


def _by_number(heading: str, noun: str, more: Sequence[Result], usual: Sequence[Result], cell: Cell) -> str:
    """Return a table by method and number of calibration samples."""
    methods = {run.method for run in more if run.calibration}
    goals = goals_of(more)
    used = [run for run in (*more, *usual) if run.method in methods and run.goal in goals]
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for run in used:
        assert run.calibration
        assert run.calibration.windows
        groups[run.method, run.calibration.windows].append(run)
    rows = []
    for method, count in sorted(groups, key=lambda key: (list(LABELS).index(key[0]), key[1])):
        found = lookup(groups[method, count])
        rows.append([f"{LABELS[method]}, {count:,} {noun}", *(cell(found.get((method, goal))) for goal in goals)])
    return markdown((heading, *goals), rows) + source(used)


def draws() -> str:
    """Mean perplexity over draws of the calibration windows, with the lowest and the highest, on two texts."""
    more = read_table("draws")
    drawn = {(run.method, run.goal) for run in more}
    results = [*(run for run in read_table("methods") if (run.method, run.goal) in drawn), *more]
    goals = goals_of(more)

    def cell(method: str, goal: str, quantity: str) -> str:
        own = [run for run in results if run.method == method and run.goal in (goal, "dense")]
        return mean_and_range([run.measured[quantity] for run in own if quantity in run.measured])

    rows = [
        [f"{LABELS[method]}, {text}", *(cell(method, goal, quantity) for goal in goals)]
        for method in sorted({run.method for run in more}, key=list(LABELS).index)
        for quantity, text in (("perplexity", "WikiText-2"), ("perplexity_second", "python-docs"))
    ]
    second = "On python-docs, evaluation has 40 windows of 512 tokens, too."
    return "\n\n".join([markdown(("perplexity", *goals), rows), second]) + source(results)


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
    columns = {
        "web text": lookup(web),
        "text by the dense model": lookup(results),
    }
    rows = [
        [f"{LABELS[method]}, {goal}", *(perplexity(found.get((method, goal))) for found in columns.values())]
        for method, goal in sorted(goals, key=lambda key: (by_goal(key[1]), list(LABELS).index(key[0])))
    ]
    return markdown(("perplexity", *columns), rows) + source([*results, *web])


def training() -> str:
    """Perplexity and seconds of models that are trained on after pruning."""

    def cell(result: Result | None) -> str:
        taken = seconds(result)
        return f"{perplexity(result)}, {taken} s" if taken else perplexity(result)

    results, goals, rows = read_table("training"), ("50 %", "60 %", "2:4"), []
    for windows, steps in sorted({_training_length(result) for result in results}):
        alike = [result for result in results if _training_length(result) == (windows, steps)]
        found = lookup(result for result in alike if result.case.get("text") in (None, "both"))
        length = f", {windows} windows in {steps} steps" if windows else ""
        for method in methods_of(found):
            rows.append([LABELS[method] + length, *(cell(found.get((method, goal))) for goal in goals)])
    names = _distinct(result.calibration.data for result in results if result.case.get("text") == "both")
    tokens = _distinct(str(result.calibration.length) for result in results if result.calibration)
    measured_on = _distinct(samples(result.evaluation) for result in results if result.evaluation)
    return "\n\n".join(
        [
            markdown(("perplexity, seconds of training", *goals), rows),
            f"Trained on windows of {', '.join(tokens)} tokens of {'; '.join(names)}. "
            f"Measured on {'; '.join(measured_on)}.",
            _by_training_text(results),
            source(results, data=False),
        ]
    )


def _training_length(result: Result) -> tuple[int, int]:
    """Return the numbers of windows and optimizer steps, 0 for a model that is not trained on."""
    return result.case.get("windows", 0), result.case.get("steps", 0)


def _by_training_text(results: Sequence[Result]) -> str:
    """Return perplexity by the text that models are trained on, for those with more than one text."""
    runs = defaultdict[tuple[str, str, tuple[int, int]], dict[str, Result]](dict)
    for result in results:
        if text := result.case.get("text"):
            runs[result.method, result.goal, _training_length(result)][text] = result
    rows = [
        [
            f"{LABELS[method]}, {goal}, {windows} windows in {steps} steps",
            *(perplexity(texts[t]) for t in ("web", "own")),
        ]
        for (method, goal, (windows, steps)), texts in runs.items()
        if texts.keys() >= {"web", "own"}
    ]
    return markdown(("perplexity by training text", "web text", "text by the dense model"), rows)


def training_images() -> str:
    """Accuracy of image classifiers that are trained on after pruning."""
    return _by_model(read_table("training_images"), lambda r: percent(r, "top1"), ("dense", "70 %", "80 %", "90 %"))


WORTH: Mapping[str, tuple[str, Cell]] = {
    "perplexity": ("perplexity", perplexity),
    "top1": ("accuracy", lambda result: percent(result, "top1", 1)),
    "weights_mib": ("MiB", lambda result: number(result, "weights_mib", ".1f")),
    "zstd_mib": ("MiB after `zstd -3`", lambda result: number(result, "zstd_mib", ".1f")),
    **{
        f"{what}_{size}": (f"{what}, batch {size}", partial(number, quantity=f"{what}_{size}", form=".2f"))
        for what in ("prefill", "decode", "images")
        for size in (1, 32)
    },
    "peak_mib": ("activations, MiB", lambda result: number(result, "peak_mib", ".0f")),
    "seconds": ("seconds to make", seconds),
}
"""Columns of the comparison of what makes a model smaller or faster: headings and cells."""


def worth() -> str:
    """Quality, size and speed of fewer bits, scattered zeros and fewer units."""
    groups = defaultdict(list)
    for result in read_worth():
        groups[result.case.get("weights", ""), result.model].append(result)
    order = sorted(groups, key=lambda key: (key[0] != "", key[1].startswith("efficientnet")))  # trained here: last
    return "\n\n".join(f"`{model}`:\n\n{_worth_of(groups[weights, model])}" for weights, model in order)


def read_worth() -> list[Result]:
    """Return the runs of the comparison; those whose quality another table has get its perplexity and seconds."""
    usual = lookup(read_table("methods"))
    return [
        result
        if result.measured.keys() & {"perplexity", "top1"}
        else replace(result, measured=result.measured | _quality(usual[result.method, result.goal]))
        for result in read_table("worth")
    ]


def _quality(result: Result) -> dict[str, float]:
    return {name: result.measured[name] for name in ("perplexity", "seconds")}


def _worth_of(results: Sequence[Result]) -> str:
    return worth_table(results, list(WORTH)) + source(results)


def worth_table(results: Sequence[Result], columns: Sequence[str]) -> str:
    """Return the rows of one model, with the columns that were measured."""
    shown = [WORTH[name] for name in columns if any(name in result.measured for result in results)]
    rows = [[_worth_name(result), *(cell(result) for _, cell in shown)] for result in by_worth(results)]
    return markdown(("", *(heading for heading, _ in shown)), rows)


def by_worth(results: Iterable[Result]) -> list[Result]:
    """Return the runs of one model in the order of their rows."""
    order = list(LABELS)
    return sorted(results, key=lambda r: (r.pattern == "structured", order.index(r.method), ":" in r.goal, r.sparsity))


def _worth_name(result: Result) -> str:
    goal = "" if result.goal == "dense" else f" {result.goal.removesuffix(' of units')}"
    name, _, more = LABELS[result.method].partition(", ")
    return f"{name}{goal}{', ' if more else ''}{more}"


FRAGMENTS: Mapping[str, Callable[[], str]] = {
    "methods": all_methods,
    "demo": demo,
    "reference": reference,
    "images": images,
    "photos": photos,
    "batch_norm": batch_norm,
    "costs": costs,
    "image_costs": image_costs,
    "scaling": scaling,
    "processes": processes,
    "finetuning": finetuning,
    "keeping_zeros": keeping_zeros,
    "sparsegpt": sparsegpt,
    "file_size": file_size,
    "quantization": quantization,
    "tasks": tasks,
    "streaming": streaming,
    "windows": windows,
    "more_photos": more_photos,
    "paired_photos": paired_photos,
    "draws": draws,
    "own_text": own_text,
    "training": training,
    "training_images": training_images,
    "worth": worth,
}
