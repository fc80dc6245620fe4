"""A measured run as a JSON file: what was done, on which data, what came out, and how to repeat it.

`benchmarks/results/TABLE/NAME.json` holds one run. The benchmarks write these files with `--save benchmarks/results`,
and `make results` makes the tables and figures of the documentation from them.
"""

import json
import os
import platform
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from wanda_lightning.common.atomic_write import atomic_write

FOLDER = Path(__file__).parent / "results"
OURS = "wanda_lightning"
PACKAGES = ("lightning", "timm", "torch", "transformers")
QUANTITIES = {
    "perplexity": "on the evaluation windows",
    "perplexity_second": "on as many windows of a second text",
    "top1": "fraction of the evaluation images that are classified correctly",
    "divergence": "mean KL divergence from the dense predictions on the evaluation images",
    "sparsity": "fraction of zeros in the pruned layers",
    "seconds": "duration",
    "forward_seconds": "processor seconds of a plain forward pass of one window through one block",
    "block_seconds": "processor seconds for one window in one block while pruning, without solving",
    "solving_seconds": "processor seconds in which the weights of one block are solved and written",
    "before_seconds": "processor seconds before the first layer is pruned",
    "ratio": "duration divided by that of the baseline, in the same process",
    "peak_mib": "largest increase of resident memory, in MiB",
    "device_mib": "peak memory of the device with the model, in MiB; of the process if the device is the CPU",
    "peak_rss_mib": "peak resident memory of the whole process, in MiB",
    "read_gb": "gigabytes read",
    "written_gb": "gigabytes written",
    "mask_difference": "fraction of the mask entries that differ from those of what it is compared with",
    "output_error": "mean relative squared error of the outputs of a layer",
    "plain_output_error": "the same for what it is compared with",
    "zeros_kept": "fraction of the pruned weights that are still zero",
    "trained_tokens": "tokens that training has read",
    "new_zeros": "fraction of the kept weights that became zero",
    "weights_mib": "bytes of all weights, or of the files that a program reads, in MiB",
    "zstd_mib": "weights_mib after zstd -3",
    "prefill_1": "tokens of a prompt per second with a batch of 1 / those of the dense float32 model",
    "prefill_32": "tokens of a prompt per second with a batch of 32 / those of the dense float32 model",
    "decode_1": "generated tokens per second with a batch of 1 / those of the dense float32 model",
    "decode_32": "generated tokens per second with a batch of 32 / those of the dense float32 model",
    "loads": "1 if a program loads the model, otherwise 0; then the note says why",
    "continuations": "number of prompts that are continued greedily",
    "same_continuations": "number of them that transformers continues with the same tokens",
    "requests_1": "new tokens per second of 1 request with 128 tokens and 128 new ones / those of the dense model",
    "requests_16": "the same for 16 requests at a time",
    "spearman": "correlation of the cosine similarities with the scores of the evaluation pairs, times 100",
    "sentences_1": "sentences of 32 tokens per second, one at a time / those of the dense float32 model",
    "sentences_32": "sentences of 64 tokens per second in batches of 32 / those of the dense float32 model",
    "images_1": "images per second with a batch of 1 / those of the dense float32 model",
    "images_32": "images per second with a batch of 32 / those of the dense float32 model",
}
"""What `measured` may hold."""


@dataclass(frozen=True)
class Samples:
    """Data for calibration or evaluation: its name, the number of windows or images, and the tokens in a window."""

    data: str
    windows: int | None = None
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured run.

    Attributes:
        model: What was pruned.
        method: Row of the table.
        sparsity: What was asked for. 0 is the dense model.
        pattern: `unstructured` or N:M; `structured` or `experts` if a fraction of the hidden units or experts leaves.
        case: What else tells the runs of a table apart, such as a dtype.
        arguments: Further arguments of `prune` or `shrink`.
        code: Whose implementation.
        calibration: Calibration data.
        evaluation: Evaluation data.
        measured: Numbers by the names in `QUANTITIES`.
        correct: One digit for each evaluation image: 1 if it is classified correctly, else 0.
        machine: Processor or GPU.
        versions: Versions of packages, of the environment of the script and of others that it used.
        command: Repeats the run. The folders of files are left out. None for code that is not in this repository.
        date: Day of the run; for runs before 0.2.0, day of the commit that added it.
        note: What a reader should know about the numbers; for code that is not in this repository, what was run.

    Machine, versions and data are None where they are not known.
    """

    model: str
    method: str
    sparsity: float = 0.0
    pattern: str = "unstructured"
    case: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    code: str = OURS
    calibration: Samples | None = None
    evaluation: Samples | None = None
    measured: dict[str, float] = field(default_factory=dict)
    correct: str | None = None
    machine: str | None = None
    versions: dict[str, str] | None = None
    command: str | None = None
    date: str | None = None
    note: str | None = None

    @property
    def goal(self):
        """Column of the table: `50 %`, `25 % of units`, `25 % of experts`, `2:4`, or `dense`."""
        if ":" in self.pattern:
            return self.pattern
        if not self.sparsity:
            return "dense"
        parts = {"structured": " of units", "experts": " of experts"}.get(self.pattern, "")
        return f"{100 * self.sparsity:g} %{parts}"

    @property
    def name(self):
        """Name of the file, without the ending."""
        parts = [self.model]
        if self.code != OURS:
            parts.append(self.code)
        parts.append(self.method)
        if self.method != "dense":
            parts.append(self.goal)
        parts += map(str, self.case.values())

        words = [re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts]
        return "-".join(filter(None, words)).lower()

    def save(self, folder):
        """Write the file into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        with atomic_write(folder / f"{self.name}.json") as new:
            new.write_text(f"{text}\n", encoding="utf-8")


def read(file):
    """Read one run."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    for name in ("calibration", "evaluation"):
        fields[name] = fields[name] and Samples(**fields[name])
    return Result(**fields)


SCORES = ("perplexity", "perplexity_second", "top1", "divergence", "spearman")
"""Quantities that another draw of the calibration data changes."""


def read_drawn(table):
    """Return the runs of a table, with means and deviations over all draws of those that `draws.py` has repeated."""
    runs = read_table(table)
    known = {_without_draw(run) for run in runs}
    repeated = [run for run in read_table("draws") if _without_draw(run) in known]
    return averaged([*runs, *repeated])


def _without_draw(run):
    """Return what a run and its repetitions have in common."""
    case = tuple(item for item in run.case.items() if item[0] != "draw")
    return run.model, run.method, run.goal, case, run.calibration, run.evaluation


def averaged(runs, key=_without_draw):
    """Return one run for each key: the first, with means and standard deviations of the scores of all.

    The deviation of a quantity is in `measured`, too: `perplexity_deviation`.
    """
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    results = []
    for first, *others in groups.values():
        measured = dict(first.measured)
        # A run without any score takes them from another table.
        for name in SCORES if measured.keys() & {*SCORES} else ():
            values = [run.measured[name] for run in (first, *others) if name in run.measured]
            if values:
                measured[name] = mean(values)
            if len(values) > 1 and first.method != "dense":
                measured[f"{name}_deviation"] = stdev(values)
        results.append(replace(first, measured=measured))
    return results


def read_table(table, folder=FOLDER):
    """Return all runs of a table, in the order of their file names."""
    return [read(file) for file in sorted((folder / table).glob("*.json"))]


class Runs:
    """Runs of one table, each written to its file as soon as it is measured.

    Args:
        folder: `--save`. Empty measures everything and writes nothing.
        table: The subfolder.
    """

    def __init__(self, folder, table):
        self.folder = Path(folder) / table if folder else None

    def __call__(self, planned, measure):
        """Return the saved run, or measure and save it."""
        return self.saved(planned) or self.save(planned, measure())

    def saved(self, planned):
        """Return the saved run, or None if there is none with the same arguments and data."""
        file = self.folder and self.folder / f"{planned.name}.json"
        if not (file and file.exists()):
            return None
        saved = read(file)
        is_same = (
            saved.arguments == planned.arguments
            and saved.calibration == planned.calibration
            and saved.evaluation == planned.evaluation
        )
        return saved if is_same else None

    def save(self, planned, measured):
        """Return the run with its numbers, and with `correct` if it is among them, after printing and saving it."""
        numbers = dict(measured)
        if "draw" in planned.case:  # which may run beside other programs
            for name in ("seconds", "peak_mib"):
                numbers.pop(name, None)
        assert numbers.keys() <= {*QUANTITIES, "correct"}, numbers.keys()
        fields = here()
        fields["versions"] |= planned.versions or {}
        result = replace(planned, correct=numbers.pop("correct", None), measured=numbers, **fields)
        shown = ", ".join(f"{key} {number:.4g}" for key, number in numbers.items())
        print(f"{result.name}: {shown}", flush=True)
        if self.folder:
            result.save(self.folder)
        return result


def here():
    """Return the fields that describe this process: machine, versions, command and date."""
    arguments = sys.argv[1:]
    if "--save" in arguments:
        start = arguments.index("--save")
        del arguments[start : start + 2]
    words = [Path(word).name if word.startswith(("/", "~")) else word for word in arguments]

    # A clone need not be installed.
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    ours = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    others = {name: metadata.version(name) for name in PACKAGES}
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), OURS: ours, **others},
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "date": date.today().isoformat(),
    }


def machine():
    """Return the processor with its number of cores, and the GPU if there is one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    match = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    name = match[1] if match else platform.machine()
    cores = f"{os.cpu_count()} cores of {name}"

    if torch.cuda.is_available():
        return f"{cores}, {torch.cuda.get_device_name()}"
    return cores


def sparsity_of(goal):
    """Return the sparsity of a goal, which is a percentage such as `50` or N:M, and the pattern if it is N:M."""
    if ":" not in goal:
        return {"sparsity": float(goal) / 100}
    kept, group = map(int, goal.split(":"))
    return {"sparsity": 1 - kept / group, "pattern": goal}
