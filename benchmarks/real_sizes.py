"""What pruning costs at the sizes of real models: the tables of what benchmarks/sizes.py has measured.

Time is a line: forward passes over all windows, plus solving and backward passes, whose time does not depend on the
number of windows. Memory is a line, too, through two numbers of windows.
"""

from dataclasses import dataclass
from functools import cached_property
from statistics import median

from result import read_table
from tables import LABELS, in_order, label, markdown, number

METHODS = ("wanda", "fast", "balanced", "best")
WINDOWS = 128  # of 2,048 tokens, the default
BACKWARD_WINDOWS = 8  # in `best`
GIB = 1024  # MiB


@dataclass(frozen=True)
class Size:
    """The runs of one model in one dtype, by what they measure and by method."""

    runs: dict

    @property
    def methods(self):
        """The methods that were timed."""
        return [method for method in METHODS if ("time", method) in self.runs]

    @property
    def weights_gib(self):
        """Size of the weights of the whole model."""
        return self.runs["time", "wanda"].measured["weights_mib"] / GIB

    @cached_property
    def blocks(self):
        """Number of blocks of the whole model."""
        return self.runs["time", "wanda"].case["blocks"]

    @cached_property
    def forward_seconds(self):
        """Seconds of a forward pass of one window through one block."""
        timed = [self.runs["time", method] for method in self.methods]
        return median(run.measured["forward_seconds"] for run in timed)

    def passes(self, method):
        """Return the forward passes over all windows that take as long as what a method does with each window."""
        measured = self.runs["time", method].measured
        return measured["block_seconds"] / measured["forward_seconds"]

    def solving(self, method):
        """Return the windows whose forward pass takes as long as solving."""
        measured = self.runs["time", method].measured
        return measured["solving_seconds"] / measured["forward_seconds"]

    def backward(self, method):
        """Return the windows whose forward pass takes as long as the backward passes."""
        if method != "best":
            return 0
        # The run has two blocks, and in all other respects it is `fast`.
        run = self.runs["backward", "fast"]
        other = self.runs["time", "fast"].measured["before_seconds"]
        seconds = (run.measured["before_seconds"] - other) / 2
        return seconds / run.measured["forward_seconds"] * BACKWARD_WINDOWS / run.case["windows"]

    def total(self, method, windows=WINDOWS):
        """Return the forward passes over all windows that take as long as pruning."""
        return self.passes(method) + (self.solving(method) + self.backward(method)) / windows

    def hours(self, passes, windows=WINDOWS):
        """Return the hours of one core that forward passes over all windows take."""
        return passes * windows * self.blocks * self.forward_seconds / 3600

    def beside_gib(self, method, windows=WINDOWS):
        """Return the memory that pruning in memory needs beside the weights."""
        point = self.runs["time", method]
        # The methods but `wanda` let windows wait at the same layers.
        like = "wanda" if method == "wanda" else "fast"
        few, many = (self.runs[measures, like] for measures in ("time", "memory"))
        more = many.case["windows"] - few.case["windows"]
        slope = (many.measured["peak_mib"] - few.measured["peak_mib"]) / more
        return (point.measured["peak_mib"] + slope * (windows - point.case["windows"])) / GIB

    def disk_gib(self, method, windows=WINDOWS):
        """Return the memory of the process that prunes from disk."""
        measured = self.runs["disk", "wanda"].measured["peak_rss_mib"]
        rest = measured - self.runs["time", "wanda"].measured["peak_mib"]
        return rest / GIB + self.beside_gib(method, windows)


def measured_sizes():
    """Return a `Size` for each model and dtype, small models first."""
    runs = {}
    for run in read_table("sizes"):
        by_model = runs.setdefault((run.model, run.case["dtype"]), {})
        by_model[run.case["measures"], run.method] = run
    sizes = {key: Size(by_model) for key, by_model in runs.items()}
    return dict(sorted(sizes.items(), key=lambda item: (item[1].weights_gib, item[0])))


def at_your_size():
    """What each method costs for a whole model, as multiples of a forward pass, with the default windows."""
    rows = []
    for (model, dtype), size in measured_sizes().items():
        name = model if dtype == "bfloat16" else f"{model}, {dtype}"
        gib = f"{size.weights_gib:.1f}"
        rows.append(
            [f"{name}, a forward pass", "1", "", "", "1", _short(size.hours(1)), "", gib, "", ""]
        )
        for method in size.methods:
            rows.append([f"{name}, {LABELS[method]}", *_cells(size, method)])
    headings = (
        "",
        "forward passes",
        "solving, in windows",
        "backward passes, in windows",
        f"total for {WINDOWS} windows, in forward passes",
        "hours of one core",
        "memory beside the weights, GiB",
        "memory with the weights, GiB",
        "memory from disk, GiB",
        "GB read and written from disk",
    )
    return markdown(headings, rows)


def _cells(size, method):
    """Return the cells of a method: time, then memory if it was measured."""
    backward = size.backward(method)
    total = size.total(method)
    cells = [
        f"{size.passes(method):.1f}",
        _short(size.solving(method)),
        _short(backward) if backward else "",
        f"{total:.1f}",
        _short(size.hours(total)),
    ]
    if ("memory", "fast") not in size.runs:
        return [*cells, "", "", "", ""]
    beside = size.beside_gib(method)
    cells += [f"{beside:.1f}", f"{beside + size.weights_gib:.1f}"]
    if method == "best":
        return [*cells, "refused", ""]
    return [*cells, f"{size.disk_gib(method):.1f}", f"{size.weights_gib * GIB**3 / 1e9:.1f}"]


def _short(number):
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}"


def size_runs():
    """The runs behind `at_your_size`: seconds of one block, and memory."""
    quantities = {
        "forward_seconds": ".2f",
        "block_seconds": ".2f",
        "solving_seconds": ".1f",
        "before_seconds": ".1f",
        "peak_mib": ".0f",
        "peak_rss_mib": ".0f",
        "read_gb": ".2f",
        "written_gb": ".2f",
    }
    rows = []
    for (model, dtype), size in measured_sizes().items():
        for run in in_order(size.runs.values()):
            shown = f"{label(run)}, {run.case['measures']}, {run.case['windows']} windows"
            cells = [number(run, quantity, form) for quantity, form in quantities.items()]
            rows.append([f"{model}, {dtype}", shown, *cells])
    headings = (
        "model",
        "run",
        "forward pass, s",
        "while pruning, s",
        "solving, s",
        "before, s",
        "peak, MiB",
        "peak of the process, MiB",
        "GB read",
        "GB written",
    )
    return markdown(headings, rows)


def larger_models():
    """What pruning Llama 2 7B takes, in one paragraph."""
    size = measured_sizes()["Llama 2 7B", "bfloat16"]
    times = []
    memory = []
    disk = []
    for method in size.methods:
        total = size.total(method)
        hours = _short(size.hours(total))
        times.append(f"{total:.1f} forward passes with `{method}` ({hours} hours of one CPU core)")
        memory.append(f"{size.beside_gib(method):.0f} with `{method}`")
        if method != "best":
            disk.append(f"{size.disk_gib(method):.0f} with `{method}`")
    return (
        f"Pruning Llama 2 7B in bfloat16 with the default {WINDOWS} windows of 2,048 tokens takes as long as "
        f"{', '.join(times)}. It needs {size.weights_gib:.0f} GiB for the weights, and beside them, in GiB, "
        f"{', '.join(memory)}. With `--stream`, the whole process needs {', '.join(disk)} GiB; `best` needs the model "
        "in memory, unless the pattern is N:M."
    )
