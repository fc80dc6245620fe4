"""What pruning costs at the sizes of real models, from what benchmarks/sizes.py has measured with two blocks.

Time is a line: forward passes over all windows, plus solving and backward passes, whose time does not depend on the
number of windows. Memory is a line, too, through two numbers of windows.
"""

from dataclasses import replace
from statistics import median

from result import Samples, read_table

METHODS = ("wanda", "fast", "balanced", "best")
WINDOWS = 128  # of 2,048 tokens, the default
BACKWARD_WINDOWS = 8  # in `best`
GIB = 1024  # MiB


def extrapolated():
    """Return runs of whole models with the default windows."""
    models = {}
    for run in read_table("sizes"):
        by_kind = models.setdefault((run.model, run.case["dtype"]), {})
        by_kind[run.case["measures"], run.method] = run
    results = []
    for runs in models.values():
        results += _of_one_model(runs)
    return results


def _of_one_model(runs):
    """Return a forward pass and each method that was timed. Times are multiples of a forward pass of one window."""
    timed = {method: runs["time", method] for method in METHODS if ("time", method) in runs}
    forward = median(run.measured["forward_seconds"] for run in timed.values())
    first = timed["wanda"]
    hours = WINDOWS * first.case["blocks"] * forward / 3600
    weights_gib = first.measured["weights_mib"] / GIB
    samples = Samples("random tokens", WINDOWS, first.calibration.length)
    plain = {"passes": 1, "total": 1, "hours": hours, "memory_gib": weights_gib}
    results = [replace(first, method="forward", sparsity=0.0, measured=plain, calibration=samples)]

    for method, run in timed.items():
        numbers = run.measured
        measured = {
            "passes": numbers["block_seconds"] / numbers["forward_seconds"],
            "solving": numbers["solving_seconds"] / numbers["forward_seconds"],
        }
        if method == "best":
            measured["backward"] = _backward(runs)
        constant = measured["solving"] + measured.get("backward", 0)
        measured["total"] = measured["passes"] + constant / WINDOWS
        measured["hours"] = measured["total"] * hours
        if ("memory", "fast") in runs:
            measured |= _memory(runs, method, weights_gib)
        results.append(replace(run, measured=measured, calibration=samples))
    return results


def _backward(runs):
    """Return the windows whose forward pass takes as long as the backward passes of `best`."""
    # The run has two blocks, and in all other respects it is `fast`.
    run = runs["backward", "fast"]
    other = runs["time", "fast"].measured["before_seconds"]
    seconds = (run.measured["before_seconds"] - other) / 2
    return seconds / run.measured["forward_seconds"] * BACKWARD_WINDOWS / run.case["windows"]


def _memory(runs, method, weights_gib):
    """Return the memory of pruning in memory and from disk, and what is read and written there."""
    # The methods but `wanda` let windows wait at the same layers.
    like = "wanda" if method == "wanda" else "fast"
    few = runs["time", like]
    many = runs["memory", like]
    more = many.case["windows"] - few.case["windows"]
    slope = (many.measured["peak_mib"] - few.measured["peak_mib"]) / more
    point = runs["time", method]
    beside = point.measured["peak_mib"] + slope * (WINDOWS - point.case["windows"])
    measured = {"beside_gib": beside / GIB, "memory_gib": beside / GIB + weights_gib}
    if method != "best":  # it is refused
        process = runs["disk", "wanda"].measured["peak_rss_mib"]
        rest = process - runs["time", "wanda"].measured["peak_mib"]
        measured["disk_gib"] = (rest + beside) / GIB
        measured["moved_gb"] = weights_gib * GIB**3 / 1e9
    return measured
