"""Compare what makes a model smaller or faster: fewer bits, scattered zeros, and fewer hidden units, in one table.

    pip install torchao zstandard
    python benchmarks/worth.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results
    python benchmarks/worth.py --images .cache/efficientnet_lite0 --data imagenet_sample --save benchmarks/results

Speeds are ratios to the dense float32 model, which runs alternately in the same process: medians of `--runs`. `prefill`
is a forward pass of 128 tokens, `decode` the 4 tokens after them with a cache, `images` a forward pass; each for
batches of 1 and 32.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from measuring import (
    MIB,
    LanguageModel,
    Photos,
    Text,
    cost_of,
    in_batches,
    run_from_shell,
    seconds,
    speeds,
)
from result import Runs, sparsity_of
from torch import nn
from torch.utils.benchmark import timer

from wanda_lightning import Distill, prune, shrink
from wanda_lightning.evaluation import WindowPerplexity

BATCHES = (1, 32)
PROMPT = 128
NEW = 4  # tokens
SCATTERED = (("best", "50"), ("thorough", "50"), ("best", "2:4"))
WIDTHS = ("12.5", "25", "50")
DISTIL = 128  # windows to calibrate and distil with


@dataclass(frozen=True, kw_only=True)
class Options(Text):
    """Either `--model`, or `--images` with a folder of a timm model and `--data`."""

    model: str = ""
    images: str = ""
    data: str = ""
    nsamples: int = 0
    """By default 16 windows or 128 images."""
    rows: Sequence[str] = ()
    """Only these methods."""
    runs: int = 2
    """Rounds of each clock; 0 measures no speeds and no memory."""
    save: str = ""


def quantized(model, bits):
    """Return the model with the weights of linear layers in a few bits, as users of torchao make it."""
    import torchao.quantization as quantization

    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:
        config = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    quantization.quantize_(model, config)
    return model


def size_of(model):
    """Return the bytes of all weights, in MiB, and how many `zstd -3` leaves."""
    from zstandard import ZstdCompressor

    parts = {}  # by their memory, so that shared weights count once
    for tensor in (*model.parameters(), *model.buffers()):
        inner = [tensor]
        if hasattr(tensor, "__tensor_flatten__"):  # a quantized weight consists of several tensors
            names, _ = tensor.__tensor_flatten__()
            inner = [getattr(tensor, name) for name in names]
        for part in inner:
            if part is not None and part.numel():
                data = part.detach().contiguous().flatten().view(torch.uint8).numpy()
                parts[part.untyped_storage().data_ptr()] = data.tobytes()

    size = sum(map(len, parts.values()))
    left = sum(len(ZstdCompressor(level=3).compress(data)) for data in parts.values())
    return {"weights_mib": size / MIB, "zstd_mib": left / MIB}


class Kind(NamedTuple):
    """What differs between language models, classifiers and sentence encoders.

    Attributes:
        dense: The model in float32.
        rows: Runs, each with what changes a copy of the model. The first is the dense one.
        quality: Measures what runs a model: returns numbers by their names.
        timed: What `clock` times.
        clock: Returns the seconds of each, for a batch size and what runs a model.
        run: Returns what runs a model, as benchmarks/programs.py does for a file.
        samples: Lists of inputs for static quantization.
    """

    dense: nn.Module
    rows: list
    quality: Callable
    timed: Sequence
    clock: Callable
    run: Callable
    samples: Sequence = ()


def measure(kind, rounds, change):
    """Return quality, bytes, speeds relative to the dense model, memory, and seconds to make the model.

    Memory is that of one round of the clock with the largest batch.
    """
    made = cost_of(lambda: change(copy.deepcopy(kind.dense)))
    model = made.result.eval()
    run = kind.run(model)
    with torch.no_grad():
        measured = {"seconds": made.seconds, **kind.quality(run), **size_of(model)}
        if not rounds:
            return measured
        both = [kind.run(kind.dense), run]
        _, ratios = speeds(kind.clock, kind.timed, both, dict.fromkeys(BATCHES, rounds))
        peak = cost_of(partial(kind.clock, max(BATCHES), run)).peak_mib
    return {**measured, **ratios, "peak_mib": peak}


def time_text(vocabulary, size, run):
    """Return the seconds of a prompt and of the tokens after it."""
    ids = np.random.default_rng(0).integers(vocabulary, size=(size, PROMPT))
    cache = None
    times = []
    for tokens in (ids, *[ids[:, :1]] * NEW):
        started = timer()
        _, cache = run(tokens, cache, np.array([tokens.shape[1] - 1]))
        times.append(timer() - started)
    return times[0], sum(times[1:])


def time_images(shape, size, run):
    """Return the seconds of images."""
    pixels = np.random.default_rng(0).normal(size=(size, *shape)).astype(np.float32)
    return [seconds(lambda: run(pixels))]


def run_text(model):
    """Return what runs a language model."""

    def run(ids, cache, kept):
        output = model(
            input_ids=torch.from_numpy(ids),
            cache=cache,
            use_cache=True,
            logits_to_keep=torch.from_numpy(kept),
        )
        return output.logits, output.cache

    return run


def run_images(model):
    """Return what runs a classifier."""
    dtype = next(model.parameters()).dtype
    return lambda pixels: (model(torch.from_numpy(pixels).to(dtype)), None)


def narrower(batches, goal, model, bits=0, **choices):
    """Return the model without a percentage of its hidden units, and with fewer bits if they are given."""
    shrink(model, batches, units=float(goal) / 100, progress=False, **choices)
    return quantized(model, bits) if bits else model


def rows_of_units(base, method, change, widths):
    """Return a row for each percentage of hidden units that are taken out: the run, and the change of a dense copy."""
    rows = []
    for goal in widths:
        row = replace(base, method=method, sparsity=float(goal) / 100, pattern="structured")
        rows.append((row, partial(change, goal)))
    return rows


def common_rows(base, batches):
    """Return the rows that all models have."""

    def scattered(method, goal, model):
        prune(model, batches, **sparsity_of(goal), method=method, progress=False)
        return model

    narrow = partial(narrower, batches)
    by_loss = partial(narrow, by="loss")
    rows = [
        (base, lambda model: model),
        (replace(base, method="bfloat16"), lambda model: model.bfloat16()),
        (replace(base, method="int8"), partial(quantized, bits=8)),
        (replace(base, method="int4"), partial(quantized, bits=4)),
        *rows_of_units(base, "structured", narrow, WIDTHS),
        *rows_of_units(base, "structured, fisher", by_loss, WIDTHS[:2]),
        *rows_of_units(base, "structured, int8", partial(narrow, bits=8), ["25"]),
    ]
    for method, goal in SCATTERED:
        row = replace(base, method=method, **sparsity_of(goal))
        rows.append((row, partial(scattered, method, goal)))
    return rows


def text(options):
    """Prepare a language model."""
    language = LanguageModel(replace(options, nsamples=options.nsamples or 16), more=DISTIL)
    base = language.planned
    rows = common_rows(base, language.calibration)
    by_seconds = partial(narrower, language.calibration, by="seconds")
    rows += rows_of_units(base, "structured, fisher seconds", by_seconds, WIDTHS[:2])

    # With more windows, and trained after the units have left.
    many = in_batches(language.data.train_windows)
    recovery = Distill(passes=2, learning_rate=1e-3)
    distilled = partial(narrower, many, by="loss", recovery=recovery)
    base = replace(base, calibration=replace(base.calibration, windows=DISTIL))
    rows += rows_of_units(base, "structured, distilled", distilled, WIDTHS[:2])

    def quality(run):
        metric = WindowPerplexity()
        for window in language.data.evaluation_windows.split(1):
            logits, _ = run(window.numpy(), None, np.arange(window.shape[1]))
            metric.update(torch.as_tensor(logits), window)
        return {"perplexity": float(metric.compute())}

    clock = partial(time_text, language.model.config.vocab_size)
    return Kind(language.model, rows, quality, ("prefill", "decode"), clock, run_text)


def photos(options):
    """Prepare a classifier with its weights, such as EfficientNet-Lite0, and images in the layout of ImageNet."""
    images = Photos(options.images, options.data, options.nsamples or 128)
    rows = common_rows(images.planned, images.calibration)
    by_seconds = partial(narrower, images.calibration, by="seconds")
    rows += rows_of_units(images.planned, "structured, fisher seconds", by_seconds, ["25", "35"])

    def quality(run):
        logits = [torch.as_tensor(run(pixels.numpy())[0]) for pixels, _ in images.evaluation]
        correct = torch.cat(logits).argmax(dim=1) == images.labels
        return {"top1": int(correct.sum()) / len(correct)}

    clock = partial(time_images, images.calibration[0].shape[1:])
    samples = [[image.numpy()] for batch in images.calibration for image in batch.split(1)]
    return Kind(images.model, rows, quality, ["images"], clock, run_images, samples)


def main(options: Options = Options()):
    """Measure the rows."""
    kind = photos(options) if options.images else text(options)
    runs = Runs(options.save, "worth")
    for planned, change in kind.rows:
        if not options.rows or planned.method in options.rows:
            runs(planned, partial(measure, kind, options.runs, change))


if __name__ == "__main__":
    run_from_shell(main)
