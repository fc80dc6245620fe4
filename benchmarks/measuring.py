"""What the benchmarks share: options, models with their data, clocks, memory, perplexity, and random models."""

import ctypes
import gc
import hashlib
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from cyclopts import App, Parameter
from result import Result, Samples
from torch.utils.benchmark import timer
from transformers import AutoModelForCausalLM

from wanda_lightning import (
    CausalLMModule,
    ImageClassifierModule,
    ImageDataModule,
    TextDataModule,
)
from wanda_lightning.evaluation import WindowPerplexity

MIB = 2**20
SECOND_TEXT = "python-docs"  # unlike the web text of calibration and WikiText-2, and part of every installation


def run_from_shell(main):
    """Call a function with its parameters as options, such as `--batch_size 4`, or `--goals 50 2:4` for a list."""
    names = Parameter(consume_multiple=True, negative=(), name_transform=str)
    app = App(
        default_parameter=names,
        help=main.__globals__["__doc__"],
        help_format="plaintext",
        version_flags=(),
    )
    app.default(main)
    app()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Text:
    """Options of a language model and its windows."""

    model: str
    """Hub id, folder or .gguf file."""
    calibration: str = "python-docs"
    eval: str = "python-docs"
    nsamples: int = 16
    seqlen: int = 512
    limit: int = 40


class LanguageModel:
    """A model in float32, its windows in batches of 4, and the result of a run that is still without numbers.

    Args:
        options: Model and windows.
        draw: Seed of the calibration windows; unless it is 0, a second text counts, too.
        more: Number of windows in `data.train_windows`, of which the calibration windows are the first.
    """

    def __init__(self, options, draw=0, more=None):
        module = CausalLMModule(options.model, dtype="float32")
        self.tokenizer = module.tokenizer
        self.model = module.model.eval()

        # The second text is only read if it is used.
        texts = list(dict.fromkeys((options.eval, SECOND_TEXT)))
        sizes = {"seqlen": options.seqlen, "num_samples": options.nsamples, "limit": options.limit}
        self.data = TextDataModule(
            self.tokenizer, options.calibration, texts, **sizes, seed=draw, train_samples=more
        )
        self.calibration = in_batches(self.data.calibration_windows)
        self.evaluation = in_batches(self.data.evaluation_windows)
        self._texts = {"perplexity": self.evaluation}
        if draw:
            self._texts["perplexity_second"] = in_batches(self.data.windows_of(SECOND_TEXT))

        self.planned = Result(
            model=Path(options.model).name,
            method="dense",
            calibration=Samples(Path(options.calibration).name, options.nsamples, options.seqlen),
            evaluation=Samples(Path(options.eval).name, options.limit, options.seqlen),
        )

    def measure(self):
        """Return the perplexity of the model in its present state on each text."""
        return {name: perplexity(self.model, windows) for name, windows in self._texts.items()}


def in_batches(windows, size=4):
    """Return windows in batches."""
    return [{"input_ids": part} for part in windows.split(size)]


class Photos:
    """A timm model with its weights, images in the layout of ImageNet, and a result as in `LanguageModel`."""

    def __init__(self, folder, data, count, seed=0):
        module = ImageClassifierModule(f"timm:local-dir:{folder}")
        self.data = ImageDataModule(data, module, num_samples=count, seed=seed)
        self.data.setup("validate")
        self.model = module.model.eval()
        self.calibration = [pixels for pixels, _ in self.data.calibration_dataloader()]
        self.evaluation = list(self.data.val_dataloader())
        self.labels = torch.cat([labels for _, labels in self.evaluation])
        samples = Samples(Path(data).name, count)
        self.planned = Result(
            model=Path(folder).name,
            method="dense",
            calibration=samples,
            evaluation=replace(samples, windows=len(self.labels)),
        )


@torch.no_grad()
def outputs(model, batches):
    """Return the logits of all images in the dtype of the model, 16 at a time."""
    dtype = next(model.parameters()).dtype
    return torch.cat([model(part.to(dtype)) for images, _ in batches for part in images.split(16)])


def seconds(step):
    """Return how long a step takes, with all kernels that it starts on an accelerator."""
    started = timer()
    step()
    return timer() - started


def medians(*clocks, runs):
    """Return the median of each clock, or of each of its numbers. They take turns, after a warm-up of one run each.

    Another program on the machine thus slows all of them.
    """
    _, *rounds = [[clock() for clock in clocks] for _ in range(1 + runs)]
    return np.median(rounds, axis=0)


def speeds(clock, timed, models, rounds):
    """Return how many times as fast as the first model each of them is; they take turns.

    Args:
        clock: Returns the seconds of each thing in `timed`, for a batch size and a model.
        timed: Names; those of the ratios have the batch size after them.
        models: What `clock` takes.
        rounds: Number of rounds for each batch size.
    """
    measured = [{} for _ in models]
    for size, runs in rounds.items():
        times = medians(*[partial(clock, size, model) for model in models], runs=runs)
        for ratios, own in zip(times[0] / times, measured, strict=True):
            own |= {f"{name}_{size}": ratio for name, ratio in zip(timed, ratios, strict=True)}
    return measured


def in_new_process(function, *arguments):
    """Call a function in a process of its own, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@torch.no_grad()
def perplexity(model, batches):
    """Return the perplexity over the windows of all batches."""
    metric = WindowPerplexity()
    for batch in batches:
        metric.update(model(**batch, use_cache=False).logits, batch["input_ids"])
    return float(metric.compute())


def fingerprint(module):
    """Return a short hash of all weights, since another machine or number of threads trains another model."""
    weights = b"".join(tensor.detach().numpy().tobytes() for tensor in module.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:6]


def random_model(config, dtype=torch.float32, device="cpu"):
    """Build a random model on a device; another device draws other weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_windows(vocabulary, samples, length, batch_size=1):
    """Return windows of random tokens in batches."""
    ids = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    return in_batches(ids, batch_size)


class Cost(NamedTuple):
    """What a step returned, its seconds, the memory before it and the largest increase during it, in MiB."""

    result: Any
    seconds: float
    start_mib: float
    peak_mib: float


def cost_of(step, device="cpu"):
    """Measure a step.

    Its memory is what an accelerator has allocated for tensors, or the resident memory of this process as Linux
    records it.
    """
    gc.collect()

    on_accelerator = torch.device(device).type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        start = torch.accelerator.memory_allocated()
    else:
        # glibc: return freed memory first, or the start would count it.
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        start = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    started = timer()
    result = step()
    duration = timer() - started

    if on_accelerator:
        peak = torch.accelerator.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return Cost(result, duration, start / MIB, (peak - start) / MIB)
