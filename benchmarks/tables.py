"""The tables of the documentation, from the runs in benchmarks/results.

Each function in `FRAGMENTS` returns the text of one table with its source. `benchmarks/pages.py` writes it into the
pages that ask for it.
"""

import math
from dataclasses import replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from statistics import linear_regression

import numpy as np
from result import OURS, from_hexadecimal, over_draws, read_drawn, read_table
from scipy.stats import sem
from servers import SERVERS

ROOT = Path(__file__).parents[1]
REFERENCE = "locuslab/wanda"
LABELS = {
    "dense": "dense",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "magnitude": "magnitude",
    "forward": "a plain forward pass",
    "REAP": "REAP",
    "REAP, block after block": 'REAP, `sequential="block"`',
    "REAP, sum": "REAP, summed (the default)",
    "loss": "effect on the loss",
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

SCALED = ("forward pass", "wanda", "sparsegpt", "admm")


def markdown(headings, rows, align="---:"):
    """Return a table; `align` is that of all columns but the first."""
    lines = []
    for row in (headings, ["---"] + [align] * (len(headings) - 1), *rows):
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid(heading, cells, columns=None):
    """Return a table of cells, each with its row and column, in the order of their first appearance."""
    table = {}
    seen = {}
    for row, column, cell in cells:
        seen[column] = None
        shown = table.setdefault(row, {}).setdefault(column, cell)
        assert shown == cell, f"{row}, {column}: a table cannot show both {shown} and {cell}."

    headings = list(columns or seen)
    rows = [[row, *(own.get(column, "") for column in headings)] for row, own in table.items()]
    return markdown([heading, *headings], rows)


def label(result):
    """Return how the method is written."""
    return LABELS.get(result.method, result.method)


def by_goals(heading, results, cell, row=label):
    """Return a table with a row for each method and a column for each goal, without the dense model."""
    pruned = in_order(run for run in results if run.method != "dense")
    cells = [(row(run), run.goal, cell(run)) for run in pruned]
    return grid(heading, cells, goals_of(pruned))


def lookup(results):
    """Return results by method and goal, of which no two have the same."""
    listed = list(results)
    table = {(result.method, result.goal): result for result in listed}
    assert len(table) == len(listed), listed
    return table


ORDER = list(LABELS)


def in_order(results):
    """Return results in the order of `LABELS`, and of their sparsities."""
    return sorted(results, key=lambda run: (ORDER.index(run.method), by_goal(run.goal)))


def label_and_goal(result):
    """Return how the method is written, and its sparsity unless it is the dense model."""
    return label(result) if result.method == "dense" else f"{label(result)}, {result.goal}"


def goals_of(results):
    """Return the sparsities that were measured: percentages, then N:M."""
    return sorted({result.goal for result in results} - {"dense"}, key=by_goal)


def dense_of(results):
    """Return the run of the dense model."""
    return next(run for run in results if run.method == "dense")


def number(result, quantity, form=".4g"):
    """Return a measured number with its deviation over draws, or an empty string if it was not measured."""
    if result is None or quantity not in result.measured:
        return ""
    shown = f"{result.measured[quantity]:{form}}"
    deviation = result.measured.get(f"{quantity}_deviation")
    if deviation is None:
        return shown
    # With as many decimals as the number.
    digits = len(shown.rstrip("%").partition(".")[2])
    if shown.endswith("%"):
        return f"{shown.rstrip('%')} ± {100 * deviation:.{digits}f}%"
    return f"{shown} ± {deviation:.{digits}f}"


def percent(result, quantity, digits=2):
    """Return a measured fraction in percent."""
    return number(result, quantity, f".{digits}%").replace("%", " %")


def seconds(result):
    """Return measured seconds, with one decimal below ten."""
    whole = number(result, "seconds", ".0f")
    return whole if len(whole) > 1 else number(result, "seconds", ".1f")


def perplexity(result):
    """Return perplexity with four digits."""
    is_large = result is not None and result.measured["perplexity"] >= 999.5
    return number(result, "perplexity", ".0f" if is_large else "#.4g")


def _perplexity(result):
    return result.measured["perplexity"]


def _deviation(result):
    return result.measured.get("perplexity_deviation", 0)


def with_seconds(result):
    """Return perplexity, and seconds if they were measured."""
    duration = seconds(result)
    return f"{perplexity(result)}, {duration} s" if duration else perplexity(result)


def by_goal(goal):
    """Order percentages before N:M."""
    return ":" in goal, goal


def samples(data):
    """Describe calibration or evaluation data."""
    if data.length:
        tokens = data.data if data.data == "random tokens" else f"tokens of {data.data}"
        return f"{data.windows} windows of {data.length} {tokens}"
    if data.data in ("digits", "random images"):
        return f"{data.windows} {data.data}"
    return f"{data.windows} images of {data.data}"


USUAL = {  # docs/measured.md says it once
    "calibration": "16 windows of 512 tokens of c4_sample.txt",
    "evaluation": "40 windows of 512 tokens of wikitext2_test.raw.txt",
}


def source(results):
    """Describe the data, unless they are the usual ones, and the notes of all results; begin with an empty line."""
    return source_of_data(results) + source_of_notes(results)


def source_of_data(results):
    """Describe the data, unless they are the usual ones; begin with an empty line."""
    sentences = []
    for name, usual in USUAL.items():
        used = [getattr(result, name) for result in results]
        described = "; ".join(_distinct(samples(data) for data in used if data))
        if described not in ("", usual):
            sentences.append(f"{name.capitalize()}: {described}.")
    return f"\n\n{' '.join(sentences)}" if sentences else ""


def source_of_notes(results):
    """List the notes of all results; begin with an empty line."""
    notes = _distinct(result.note for result in results)
    lines = [f"- {_noted(note, results)}{note}" for note in notes]
    return "\n\n" + "\n".join(lines) if lines else ""


def _noted(note, results):
    """Name the runs that have a note, unless these are all or many."""
    noted = [run for run in results if run.note == note]
    if len(noted) == len(results):
        return ""
    names = _distinct(label_and_goal(run) for run in noted)
    return f"{'; '.join(names)}: " if len(names) <= 4 else "Some runs: "


def _distinct(values):
    return list(dict.fromkeys(filter(None, values)))


def methods():
    """Perplexity, seconds and memory of all methods with a language model."""
    results = in_order(read_drawn("methods"))
    goals = ["50 %", "60 %", "70 %", "2:4"]
    wanda = {
        run.goal: _perplexity(run) + 2 * _deviation(run) for run in results if run.method == "wanda"
    }
    rows = []
    worse = []
    for method, group in groupby(results, lambda run: run.method):
        runs = {run.goal: run for run in group if run.goal in ("dense", *goals)}
        cells = [perplexity(runs.get("dense", runs.get(goal))) for goal in goals]
        times = ", ".join(filter(None, map(seconds, runs.values())))
        peaks = [run.measured.get("peak_mib", 0) for run in runs.values()]
        peak = f"{max(peaks):.0f}" if any(peaks) else ""
        rows.append([LABELS[method], *cells, times, peak])

        lost = [
            goal
            for goal, run in runs.items()
            if _perplexity(run) - 2 * _deviation(run) > wanda.get(goal, math.inf)
        ]
        if lost and method != "magnitude":
            worse.append(f"{LABELS[method]} ({', '.join(lost)})")

    others = [run for run in results if run.goal not in ("dense", *goals)]
    other = [f"{label(run)} {perplexity(run)} at {run.goal}" for run in others]
    sentences = f"Worse than Wanda: {', '.join(worse)}. Other sparsities: {', '.join(other)}."
    headings = ("perplexity", *goals, "seconds", "peak memory above the model, MiB")
    return f"{markdown(headings, rows)}\n\n{sentences}{source(results)}"


def demo():
    """Perplexity in `make demo` on two texts."""
    results = in_order(read_table("demo"))
    cells = []
    for run in results:
        method = label(run)
        cells.append((method, "sparsity", run.goal if run.sparsity else "0"))
        cells.append((method, run.case["on"], perplexity(run)))
    columns = ["sparsity", "sklearn-docs", "python-docs"]
    return grid("method", cells, columns) + source(results)


def reference():
    """Our perplexity beside that of other implementations."""
    results = in_order(read_table("reference"))
    by_code = {}
    for run in results:
        by_code.setdefault(run.code, []).append(run)
    ours = by_code[OURS]
    paper = by_code[REFERENCE]
    alps = by_code["ALPS"]

    usual = lookup(read_table("methods"))
    same_setting = usual | lookup(ours)
    rows = []
    for theirs in paper:
        own = same_setting[theirs.method, theirs.goal]
        goal = theirs.goal.replace("dense", "")
        rows.append([label(theirs), goal, perplexity(own), perplexity(theirs)])
    first = markdown(("method", "sparsity", "ours", "reference code"), rows)

    # Without seconds: those of ALPS are of a machine whose state was not recorded.
    presets = product(("balanced", "best", "thorough"), (run.goal for run in alps))
    beside = [*alps, *(usual[preset] for preset in presets)]
    second = grid("perplexity", [(run.goal, label(run), perplexity(run)) for run in beside])
    notes = _distinct(f"- {run.code}: {run.note}" for run in (*paper, *alps))
    return "\n\n".join([first, second, "\n".join(notes)]) + source(ours)


def images():
    """Accuracy of classifiers that were trained on digits, and the divergence from the dense predictions."""

    def cell(run):
        return f"{percent(run, 'top1')} ({number(run, 'divergence', '#.2g')})"

    return _by_model(read_table("images"), cell)


def photos():
    """Accuracy of classifiers with their weights, and the divergence from the dense predictions."""
    return _by_model(read_drawn("photos"), _accuracy_and_divergence)


def _accuracy_and_divergence(result):
    return f"{percent(result, 'top1', 1)} ({number(result, 'divergence', '.3f')})"


def batch_norm():
    """Accuracy without and with the correction of BatchNorm statistics."""

    def cell(run):
        before = percent(run, "top1_uncorrected", 1).removesuffix(" %")
        return f"{before} -> {percent(run, 'top1', 1)}"

    return _by_model(read_table("batch_norm"), cell)


def _by_model(results, cell):
    """Return one table for each trained model."""
    parts = []
    for (weights, model), group in by_model(results).items():
        name = f"`{model}` with the weights `{weights}`" if weights else f"`{model}`"
        dense = percent(dense_of(group), "top1")
        parts += [f"{name}, {dense} dense:", by_goals("method", group, cell)]
    return "\n\n".join(parts) + source_of_data(results)


def by_model(results):
    """Return the results of each model by its weights and its name, first by the weights, longer names first."""

    def key(result):
        return result.case.get("weights", ""), -len(result.model), result.model

    groups = groupby(sorted(results, key=key), key)
    return {(weights, model): list(group) for (weights, _, model), group in groups}


def costs():
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
        sequential = result.case.get("sequential")
        if sequential:
            name = f'Wanda, `sequential="{sequential}"` / {passes[sequential]}'
        elif name == "2:4 mask":
            name = f"2:4 mask of a {result.model} / `w.abs().mul_(s)`"
        rows.append([name, number(result, "ratio", ".2f"), number(result, "peak_mib", ".0f")])
    return markdown(("", "time, as a ratio", "peak memory, MiB"), rows) + source(results)


def scaling():
    """Processor seconds and peak memory by windows, blocks and width, with exponents."""
    results = sorted(read_table("scaling"), key=lambda run: run.case["value"])
    parts = []
    for size in ("windows", "blocks", "width"):
        runs = [run for run in results if run.case["by"] == size]
        sizes = sorted({run.case["value"] for run in runs})
        headings = [*map(str, sizes), "exponent"]
        for quantity, name, form in (
            ("processor_seconds", "seconds", ".2f"),
            ("peak_mib", "MiB", ".0f"),
        ):
            rows = []
            for method in SCALED:
                measured = [run for run in runs if run.method == method]
                cells = [number(run, quantity, form) for run in measured]
                growth = exponent(sizes, [run.measured[quantity] for run in measured])
                rows.append([label(measured[0]), *cells, growth])
            parts.append(markdown([f"{name} by {size}", *headings], rows))
    return "\n\n".join(parts) + source_of_notes(results)


def exponent(sizes, costs):
    """Return the exponent of the growth, from the three largest sizes."""
    slope = linear_regression(np.log(sizes[-3:]), np.log(costs[-3:])).slope
    return f"{round(slope, 2) or 0.0:.2f}"  # not -0.00


def finetuning():
    """Perplexity before and after fine-tuning."""
    results = read_table("finetuning")
    results.sort(key=lambda run: (by_goal(run.goal), run.method == "full"))
    cells = [(f"Wanda, {run.goal}", "pruned", number(run, "perplexity_before")) for run in results]
    for run in results:
        cells.append((f"Wanda, {run.goal}", f"then `{run.method}`", perplexity(run)))
    return grid("perplexity", cells) + source(results)


def keeping_zeros():
    """Cost of keeping zeros in a training step."""
    results = read_table("keeping_zeros")
    rows = []
    for run in results:
        adapters = run.case.get("adapters")
        beside = f"LoRA: {adapters}" if adapters else "without: AdamW, all weights"
        memory = f"{number(run, 'peak_mib', '.0f')} / {number(run, 'plain_peak_mib', '.0f')}"
        rows.append([f"`{run.method}` / {beside}", number(run, "ratio", ".2f"), memory])
    return markdown(("", "time, as a ratio", "peak memory, MiB"), rows) + source(results)


def quantization():
    """Zeros that quantizers keep."""
    order = ("none", "torchao", "bitsandbytes", "gguf", "compressed_tensors")

    def key(run):
        quantizer = run.case.get("quantizer", "none")
        return run.sparsity, order.index(quantizer), run.case.get("scheme", "none")

    results = sorted(read_table("quantization"), key=key)
    rows = []
    for run in results:
        cells = list(run.case.values())
        if run.case.get("quantizer", "none") == "none":
            cells = ["", "none, pruned" if run.sparsity else "none, dense"]
        for quantity in ("zeros_kept", "new_zeros"):
            share = run.measured.get(quantity)
            cells.append("" if share is None else f"{100 * share:.3g} %")
        rows.append([*cells, perplexity(run)])
    headings = ("quantizer", "scheme", "zeros kept", "new zeros", "perplexity")
    return markdown(headings, rows) + source(results)


def tasks():
    """Zero-shot accuracy beside perplexity."""
    results = sorted(read_table("tasks"), key=_perplexity)
    perplexities = {}
    accuracies = []
    for run in results:
        row = label_and_goal(run)
        # Tasks that were measured on another day may have another last digit; the lowest is shown.
        perplexities.setdefault(row, (row, "perplexity", perplexity(run)))
        for metric in ("acc", "acc_norm"):
            if metric in run.measured:
                error = percent(run, f"{metric}_error", 1)
                shown = f"{percent(run, metric, 1).removesuffix(' %')} ± {error}"
                accuracies.append((row, f"{run.case['task']}, {metric}", shown))
    columns = ["perplexity", *sorted({column for _, column, _ in accuracies})]
    return grid("", [*perplexities.values(), *accuracies], columns) + source(results)


def streaming():
    """Memory of pruning from disk."""
    results = read_table("streaming_memory")
    results.sort(key=lambda run: (run.model, run.method, run.case["layers"], run.name))
    quantities = {"peak_rss_mib": ".0f", "read_gb": ".2f", "written_gb": ".2f"}
    rows = []
    for run in results:
        choices = [f"{name} {value}" for name, value in run.case.items() if name != "layers"]
        shown = ", ".join([label_and_goal(run), *choices])
        cells = [number(run, *quantity) for quantity in quantities.items()]
        rows.append([run.model, shown, str(run.case["layers"]), *cells])
    headings = ("model", "choices", "layers", "peak, MiB", "GB read", "GB written")
    return markdown(headings, rows) + source(results)


def quantized_mixtures():
    """Perplexity of quantized mixtures with fewer experts, in transformers and in llama.cpp."""
    formats = ("bfloat16", "FP8 in blocks", "FP8 by rows", "int4, packed", "MXFP4")
    results = read_table("quantized_mixtures")
    results.sort(key=lambda run: (formats.index(run.case["format"]), run.sparsity))
    rows = []
    for run in results:
        cells = (
            number(run, "weights_mib", ".1f"),
            number(run, "perplexity", "#.4g"),
            number(run, "llama_cpp_perplexity", "#.4g"),
        )
        rows.append([run.case["format"], run.goal, *cells])
    headings = ("format", "removed", "MiB stored", "transformers", "llama.cpp")
    return markdown(headings, rows) + source(results)


def mixtures():
    """Cost of taking experts out of quantized mixtures with two blocks."""
    results = read_table("mixtures")
    passes = {run.model: run for run in results if run.method == "forward"}
    rows = []
    for run in results:
        if run.method == "forward":
            continue
        plain = passes[run.model]
        ratio = run.measured["processor_seconds"] / plain.measured["processor_seconds"]
        cells = [
            f"{run.case['weights_mib'] * 2**20 / 1e9:.2f}",
            number(run, "written_gb", ".2f"),
            number(plain, "processor_seconds", ".0f"),
            number(run, "processor_seconds", ".0f"),
            f"{ratio:.1f}",
            number(plain, "peak_rss_mib", ".0f"),
            number(run, "peak_rss_mib", ".0f"),
        ]
        rows.append([run.model, run.goal, *cells])
    headings = (
        "two blocks of",
        "removed",
        "GB stored",
        "GB written",
        "s, forward pass",
        "s, pruning",
    )
    more = ("ratio", "peak MiB, forward pass", "peak MiB, pruning")
    return markdown((*headings, *more), rows) + source(results)


def windows():
    """Perplexity by the number of calibration windows."""
    runs = read_table("windows")
    return _by_number("perplexity", "windows", runs, read_table("methods"), perplexity)


def more_photos():
    """Accuracy and divergence of classifiers with their weights, by the number of calibration images."""
    runs = [run for run in read_table("more_photos") if " at layer" not in run.method]
    heading = "accuracy (divergence)"
    return _by_number(heading, "images", runs, read_table("photos"), _accuracy_and_divergence)


def _by_number(heading, noun, more, usual, cell):
    """Return a table by method and number of calibration samples."""
    methods = {run.method for run in more if run.calibration}
    goals = goals_of(more)
    shown = [run for run in (*more, *usual) if run.method in methods and run.goal in goals]
    shown.sort(key=_count)
    return by_goals(heading, shown, cell, lambda run: f"{label(run)}, {_count(run):,} {noun}")


def _count(run):
    assert run.calibration
    return run.calibration.windows or 0


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


def paired_photos():
    """Differences of the accuracy between presets on the same images, each with its standard error."""
    results = [*read_table("photos"), *read_table("more_photos")]
    dense = dense_of(results)
    pruned = sorted((run for run in results if run.calibration), key=_count)
    runs = {(run.method, run.goal, _count(run)): run for run in pruned}
    cells = []
    for method, other in PAIRS:
        for run in pruned:
            beside = dense if other == "dense" else runs.get((other, run.goal, _count(run)))
            if run.method == method and beside:
                row = f"{LABELS[method]} - {LABELS[other]}, {_count(run):,} images"
                cells.append((row, run.goal, _paired(run, beside)))
    return grid("points of accuracy (standard error)", cells, goals_of(pruned))


def _paired(*runs):
    """Return the difference of two accuracies on the same images in points, and its standard error."""
    correct = [from_hexadecimal(run.correct, run.evaluation.windows) for run in runs]
    differences = 100.0 * np.subtract(*correct, dtype=float)
    return f"{differences.mean():+.1f} ({sem(differences):.1f})"


def draws():
    """Perplexity on two texts over draws of the calibration windows."""
    usual = read_table("methods")
    more = [run for run in in_order(read_table("draws")) if run.model == usual[0].model]
    more = [run for run in more if run.pattern != "structured"]
    cells = []
    for method, (quantity, text) in product(
        dict.fromkeys(run.method for run in more),
        (("perplexity", "WikiText-2"), ("perplexity_second", "python-docs")),
    ):
        for goal in goals_of(more):
            runs = [run for run in (*usual, *more) if (run.method, run.goal) == (method, goal)]
            dense = [run for run in more if run.method == method == "dense"]
            measured = dense[0].measured if dense else over_draws(runs)
            shown = number(replace(more[0], measured=measured), quantity, "#.4g")
            cells.append((f"{LABELS[method]}, {text}", goal, shown))
    return grid("perplexity", cells, goals_of(more))


def encoder_draws():
    """Scores of a sentence encoder in float32 over draws of the calibration sentences."""
    rows = []
    for run in in_order(read_table("embedding")):
        if run.case == {"program": "onnxruntime", "numbers": "float32"}:
            own = (run.model, run.method, run.goal)
            others = [
                each for each in read_table("draws") if own == (each.model, each.method, each.goal)
            ]
            run = replace(run, measured=run.measured | over_draws([run, *others]))
            rows.append([label_and_goal(run), number(run, "spearman", ".2f")])
    return markdown(("", "STS-B"), rows)


def own_text():
    """Perplexity after calibration with web text, and with text that the dense model writes."""
    own = [run for run in read_table("own_text") if run.method != "dense"]
    goals = {(run.method, run.goal) for run in own}
    web = [run for run in read_table("methods") if (run.method, run.goal) in goals]
    cells = []
    for text, runs in (("web text", web), ("text by the dense model", own)):
        for run in in_order(runs):
            cells.append((label_and_goal(run), text, perplexity(run)))
    return grid("perplexity", cells) + source([*own, *web])


CALIBRATED_ON = {
    "text": "web text",
    "chats": "chats",
    "both": "web text and chats",
    "rows": "chats, one in each window",
}


def chats():
    """Perplexity of a chat model on chats and on WikiText-2, after calibration on either."""
    results = in_order(read_table("chats"))
    dense = dense_of(results)
    groups = {("(dense)", dense.method): [dense]}
    for (key, heading), run in product(CALIBRATED_ON.items(), results):
        if run.case.get("calibration") == key:
            groups.setdefault((heading, run.method), []).append(run)

    cells = []
    for quantity, text in (("perplexity_chats", "chats"), ("perplexity", "WikiText-2")):
        for (heading, method), runs in groups.items():
            mean = replace(runs[0], measured=runs[0].measured | over_draws(runs))
            for shown in ("wanda", "balanced") if method == "dense" else (method,):
                cells.append((heading, f"{text}, {LABELS[shown]}", number(mean, quantity, "#.4g")))
    return grid("calibrated on", cells) + source(results)


OTHER_SCORES = ("REAP, block after block", "loss")


def experts():
    """Perplexity of a small mixture without some of its experts."""
    rows = mixture_rows("small_mixture")
    dense = perplexity(dense_of(rows))
    shown = [run for run in rows if run.method not in OTHER_SCORES]
    return by_goals(f"perplexity (dense {dense})", shown, perplexity) + source(shown)


def expert_scores():
    """Perplexity and divergence of a mixture without some of its experts, after long and after short training."""
    divergent = partial(number, quantity="divergence", form=".4f")
    tables = []
    for model, steps in (("small_mixture", "2,000"), ("small_mixture_600", "600")):
        rows = [run for run in mixture_rows(model) if run.pattern == "experts"]
        dense = perplexity(dense_of(mixture_rows(model)))
        tables.append(by_goals(f"{steps} steps: perplexity (dense {dense})", rows, perplexity))
        tables.append(by_goals(f"{steps} steps: KL divergence", rows, divergent))
        tables.append(source(rows).strip())
    return "\n\n".join(tables)


def mixture_rows(model):
    """Return the runs of `experts`, with means and deviations in place of several draws."""
    by_row = {}
    for run in read_table("experts"):
        if run.model == model:
            by_row.setdefault((run.method, run.goal), []).append(run)
    return [
        replace(runs[0], measured=runs[0].measured | over_draws(runs)) for runs in by_row.values()
    ]


def training():
    """Perplexity and seconds of models that are trained on after pruning."""
    results = read_table("training")
    results.sort(key=lambda run: (run.case.get("windows", 0), run.case.get("steps", 0)))
    texts = {"web": "web text", "own": "text by the dense model"}
    usual = []
    by_text = []
    for run in results:
        row = label(run)
        if "windows" in run.case:
            row += f", {run.case['windows']} windows in {run.case['steps']} steps"
        text = texts.get(run.case.get("text"))
        if text:
            by_text.append((f"{row}, {run.goal}", text, perplexity(run)))
        else:
            usual.append((row, run.goal, with_seconds(run)))

    first = grid("perplexity, seconds of training", usual, goals_of(results))
    (name,) = {run.calibration.data for run in results if run.case.get("text") == "both"}
    trained_on = f"Trained on windows of 512 tokens of {name}."
    second = grid("perplexity by training text", by_text, list(texts.values()))
    return f"{first}\n\n{trained_on}\n\n{second}{source_of_notes(results)}"


def _column(heading, quantity, form):
    return heading, partial(number, quantity=quantity, form=form)


WORTH = {
    "perplexity": ("perplexity", perplexity),
    "top1": ("accuracy", partial(percent, quantity="top1", digits=1)),
    "spearman": _column("score", "spearman", ".2f"),
    "weights_mib": _column("MiB", "weights_mib", ".1f"),
    "zstd_mib": _column("MiB after `zstd -3`", "zstd_mib", ".1f"),
    "prefill_1": _column("prefill, batch 1", "prefill_1", ".2f"),
    "prefill_32": _column("prefill, batch 32", "prefill_32", ".2f"),
    "decode_1": _column("decode, batch 1", "decode_1", ".2f"),
    "decode_32": _column("decode, batch 32", "decode_32", ".2f"),
    "images_1": _column("images, batch 1", "images_1", ".2f"),
    "images_32": _column("images, batch 32", "images_32", ".2f"),
    "sentences_1": _column("one sentence", "sentences_1", ".2f"),
    "sentences_32": _column("32 sentences", "sentences_32", ".2f"),
    "peak_mib": _column("activations, MiB", "peak_mib", ".0f"),
    "seconds": ("seconds to make", seconds),
}
"""Columns of the comparison of what makes a model smaller or faster: headings and cells."""


def worth():
    """Quality, size and speed of fewer bits, scattered zeros and fewer units."""
    parts = []
    for (_, model), runs in by_model(read_worth()).items():
        parts.append(f"`{model}`:\n\n{worth_table(runs, list(WORTH))}{source(runs)}")
    return "\n\n".join(parts)


def read_worth():
    """Return the runs of the comparison; those whose quality another table has get its perplexity and seconds."""
    usual = lookup(read_drawn("methods"))
    results = []
    for run in read_drawn("worth"):
        if not run.measured.keys() & {"perplexity", "top1"}:
            measured = usual[run.method, run.goal].measured
            names = measured.keys() & {"perplexity", "perplexity_deviation", "seconds"}
            quality = {name: measured[name] for name in names}
            run = replace(run, measured=run.measured | quality)
        results.append(run)
    return results


def worth_table(results, columns):
    """Return the rows of one model, with the columns that were measured."""
    measured = {name for run in results for name in run.measured}
    shown = [WORTH[name] for name in columns if name in measured]
    rows = []
    for run in sorted(in_order(results), key=lambda run: run.pattern == "structured"):
        cells = [cell(run) for _, cell in shown]
        name = _worth_name(run)
        if "spearman" in measured and not any(_beats(other, run) for other in results):
            name = f"**{name}**"
        rows.append([name, _fewer_parameters(run, results), *cells])
    return markdown(("", "fewer parameters", *(heading for heading, _ in shown)), rows)


def _beats(other, result):
    """Whether another file of a sentence encoder has a better score and is as fast, with 3 % for noise."""
    theirs = other.measured
    ours = result.measured
    is_better = theirs["spearman"] > ours["spearman"]
    return is_better and theirs["sentences_32"] > 0.97 * ours["sentences_32"]


def _fewer_parameters(result, results):
    """Return the share of the parameters that left with hidden units: that of the bytes in float32."""
    if result.pattern != "structured":
        return ""
    sizes = {}
    for run in results:
        if run.case.get("numbers", "float32") == "float32":
            sizes[run.method, run.goal] = run.measured["weights_mib"]
    left = sizes[result.method.removesuffix(", int8"), result.goal] / sizes["dense", "dense"]
    return f"{1 - left:.0%}".replace("%", " %")


def runtimes(table="runtimes"):
    """Quality, size and speed of fewer bits and fewer units, in programs that run models on a CPU."""
    runs = read_table(table)
    runs.sort(key=lambda run: (run.model, run.case["program"], -run.measured["weights_mib"]))
    parts = []
    for name, group in groupby(runs, lambda run: f"`{run.model}` in {run.case['program']}"):
        parts.append(f"{name}:\n\n{worth_table(list(group), list(WORTH))}")
    return "\n\n".join(parts)


def serving(method=""):
    """Which servers load smaller models, whether they write what transformers writes, and how fast."""
    runs = [run for run in in_order(read_table("serving")) if run.method.endswith(method)]
    servers = list(SERVERS)
    runs.sort(key=lambda run: (servers.index(run.case["server"]), not run.calibration))
    cells = []
    for run in runs:
        server = run.case["server"]
        family, _, _ = run.model.partition("-")
        name = f"{family}, {_worth_name(run)}"
        cells.append((name, f"{server} {run.versions[server]}", served(run)))
    return grid("", cells)


def served(run):
    """Return how a server runs a model: the cell of the table."""
    if not run.measured["loads"]:
        if "Expected shape" in run.note:
            return "no: it has one width for all layers"
        return f"no: {run.note}"
    parts = ["yes"]
    same = run.measured["same_continuations"]
    if same < run.measured["continuations"]:
        parts.append(f"{same} of {run.measured['continuations']} equal")
    if "requests_16" in run.measured:
        parts.append(" / ".join(number(run, f"requests_{size}", ".2f") for size in (1, 16)))
    return ", ".join(parts)


def _worth_name(result):
    name, _, details = label(result).partition(", ")
    if result.goal != "dense":
        name += f" {result.goal.removesuffix(' of units')}"
    return ", ".join(filter(None, (name, details, result.case.get("numbers"))))


_TABLES = (
    methods,
    demo,
    reference,
    images,
    photos,
    batch_norm,
    costs,
    scaling,
    finetuning,
    keeping_zeros,
    quantization,
    tasks,
    streaming,
    windows,
    more_photos,
    paired_photos,
    draws,
    encoder_draws,
    own_text,
    chats,
    experts,
    expert_scores,
    mixtures,
    quantized_mixtures,
    training,
    worth,
    runtimes,
    serving,
)
FRAGMENTS = {table.__name__: table for table in _TABLES}
