"""Compare what makes a model smaller or faster: fewer bits, scattered zeros, and fewer hidden units, in one table.

    pip install torchao zstandard torch-pruning optipfair
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

import numpy as np
import torch
from measuring import (
    MIB,
    LanguageModel,
    Photos,
    Text,
    cost_of,
    in_batches,
    outputs,
    perplexity,
    run_from_shell,
    seconds,
    speeds,
)
from result import Runs, sparsity_of
from torch import nn
from torch.utils.benchmark import timer
from torch.utils.data import DataLoader

from wanda_lightning import Distill, Fisher, prune, shrink

BATCHES = (1, 32)
PROMPT = 128
NEW = 4  # tokens
SCATTERED = (("best", "50"), ("thorough", "50"), ("best", "2:4"))
BY_LOSS = Fisher(num_samples=8, num_predictions=4096)  # as in the presets
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


def by_peer(batch, goal, model):
    """Return the model without the units that Torch-Pruning takes out of its MLPs, as in its example for LLMs."""
    import torch_pruning

    mlps = [block.mlp for block in model.model.layers]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": batch["input_ids"][:1], "use_cache": False},
        output_transform=lambda output: output.logits,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=0.0,
        pruning_ratio_dict={mlp.gate_proj: float(goal) / 100 for mlp in mlps},
        root_module_types=[nn.Linear],
        ignored_layers=[model.lm_head],
        round_to=8,
    )
    pruner.step()
    return model


def by_optipfair(batches, training, goal, model):
    """Return the model without the units that OptiPFair takes out, by its defaults, then trained by its defaults."""
    import optipfair

    dense = copy.deepcopy(model)
    percentage = float(goal)
    optipfair.prune_model(
        model, pruning_percentage=percentage, dataloader=batches, show_progress=False
    )
    if training:
        order = torch.Generator().manual_seed(0)
        shuffled = DataLoader(training, batch_size=None, shuffle=True, generator=order)
        optipfair.distill_model(model, dense, shuffled, show_progress=False)
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


@dataclass(frozen=True)
class Comparison:
    """Measures what each change does to one model, beside the dense one in float32.

    Attributes:
        dense: The model.
        quality: Returns numbers by their names.
        timed: What `clock` times.
        clock: Returns the seconds of each, for a batch size and what runs a model.
        run: Returns what runs a model, as benchmarks/programs.py does for a file.
        rounds: Rounds of the clock. Memory is that of one with the largest batch.
    """

    dense: nn.Module
    quality: Callable
    timed: Sequence
    clock: Callable
    run: Callable
    rounds: int

    def __call__(self, change):
        """Return quality, bytes, speeds relative to the dense model, memory, and seconds to make the model."""
        made = cost_of(lambda: change(copy.deepcopy(self.dense)))
        model = made.result.eval()
        with torch.no_grad():
            measured = {"seconds": made.seconds, **self.quality(model), **size_of(model)}
            if not self.rounds:
                return measured
            both = [self.run(self.dense), self.run(model)]
            rounds = dict.fromkeys(BATCHES, self.rounds)
            _, ratios = speeds(self.clock, self.timed, both, rounds)
            peak = cost_of(partial(self.clock, max(BATCHES), both[1])).peak_mib
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

    def run(ids, cache, _):
        output = model(
            input_ids=torch.from_numpy(ids), cache=cache, use_cache=True, logits_to_keep=1
        )
        return output.logits, output.cache

    return run


def run_images(model):
    """Return what runs a classifier."""
    dtype = next(model.parameters()).dtype
    return lambda pixels: model(torch.from_numpy(pixels).to(dtype))


def narrower(batches, goal, model, bits=0, **choices):
    """Return the model without a percentage of its hidden units, and with fewer bits if they are given."""
    prune(model, batches, float(goal) / 100, pattern="structured", **choices, progress=False)
    shrink(model)
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
    by_loss = partial(narrow, allocation=BY_LOSS)
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
    batches = language.calibration
    peer = replace(base, code="Torch-Pruning")
    other = replace(base, code="OptiPFair")
    narrow = partial(narrower, batches, allocation=replace(BY_LOSS, cost="seconds"))

    # With more windows, and trained after the units have left.
    many = in_batches(language.data.train_windows, 4)
    single = in_batches(language.data.train_windows, 1)
    windows = {"calibration": replace(base.calibration, windows=DISTIL)}
    recovery = Distill(passes=2, learning_rate=1e-3)
    distilled = partial(narrower, many, allocation=BY_LOSS, recovery=recovery)

    rows = common_rows(base, batches)
    for planned, method, change in (
        (base, "structured, fisher seconds", narrow),
        (peer, "GroupMagnitude", partial(by_peer, batches[0])),
        (other, "PPM", partial(by_optipfair, None, [])),
        (other, "hybrid PPM", partial(by_optipfair, batches, [])),
        (replace(other, **windows), "hybrid PPM, distilled", partial(by_optipfair, many, single)),
        (replace(base, **windows), "structured, distilled", distilled),
    ):
        rows += rows_of_units(planned, method, change, WIDTHS[:2])

    def quality(model):
        return {"perplexity": perplexity(model, language.evaluation)}

    clock = partial(time_text, language.model.config.vocab_size)
    timed = ("prefill", "decode")
    return Comparison(language.model, quality, timed, clock, run_text, options.runs), rows


def photos(options):
    """Prepare a classifier with its weights, such as EfficientNet-Lite0, and images in the layout of ImageNet."""
    images = Photos(options.images, options.data, options.nsamples or 128)

    def quality(model):
        correct = outputs(model, images.evaluation).argmax(dim=1) == images.labels
        return {"top1": int(correct.sum()) / len(correct)}

    rows = common_rows(images.planned, images.calibration)
    timed = partial(narrower, images.calibration, allocation=Fisher(cost="seconds"))
    rows += rows_of_units(images.planned, "structured, fisher seconds", timed, ["25", "35"])
    clock = partial(time_images, images.calibration[0].shape[1:])
    return Comparison(images.model, quality, ["images"], clock, run_images, options.runs), rows


def main(options: Options = Options()):
    """Measure the rows."""
    comparison, rows = photos(options) if options.images else text(options)
    runs = Runs(options.save, "worth")
    for planned, change in rows:
        if not options.rows or planned.method in options.rows:
            runs(planned, partial(comparison, change))


if __name__ == "__main__":
    run_from_shell(main)
