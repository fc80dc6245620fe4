"""Compare what makes a model smaller or faster: fewer bits, scattered zeros, and fewer hidden units, in one table.

    pip install torchao zstandard
    python benchmarks/worth.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results
    python benchmarks/worth.py --digits --save benchmarks/results
    python benchmarks/worth.py --images .cache/efficientnet_lite0 --data imagenet_sample --save benchmarks/results

Speeds are ratios to the dense float32 model, which runs alternately in the same process: medians of `--runs`. `prefill`
is a forward pass of 128 tokens, `decode` the 16 tokens after them with a cache, `images` a forward pass; each for
batches of 1 and 32.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measuring import MIB, PeakMemory, columns, fingerprint, medians, seconds
from result import Result, Runs, Samples
from rich.console import Console
from torch import Tensor, nn

from wanda_lightning import (
    CausalLMModule,
    Distil,
    Fisher,
    ImageClassifierModule,
    ImageDataModule,
    KeepZeros,
    TextDataModule,
    prune,
    shrink,
)
from wanda_lightning.modules import WindowPerplexity

BATCHES = (1, 32)
PROMPT, NEW = 128, 16  # tokens
Measured = dict[str, float]
Change = Callable[[nn.Module], nn.Module]
WIDTHS = ("12.5", "25", "50")


def structured(percentage: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of `prune` for hidden units."""
    return {"sparsity": float(percentage) / 100, "pattern": "structured", **more}


UNSTRUCTURED: dict[str, dict[str, Any]] = {
    "best 50 %": {"sparsity": 0.5, "method": "best"},
    "thorough 50 %": {"sparsity": 0.5, "method": "thorough"},
    "best 2:4": {"sparsity": 0.5, "method": "best", "pattern": "2:4"},
}
UNITS: dict[str, dict[str, Any]] = {
    **{f"structured {width} %": structured(width) for width in WIDTHS},
    **{f"structured {width} %, fisher": structured(width, allocation=Fisher(num_samples=8)) for width in WIDTHS[:2]},
    "structured 25 %, distilled": structured("25", recovery=Distil(passes=1)),
}


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy with the weights of linear layers in a few bits, as users of torchao make it."""
    import torchao.quantization as quantization

    model = copy.deepcopy(model)
    int4 = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig() if bits == 8 else int4)
    return model


def size_of(model: nn.Module) -> Measured:
    """Return the bytes of all weights, in MiB, and how many `zstd -3` leaves."""
    from zstandard import ZstdCompressor

    seen: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        inner = getattr(tensor, "__tensor_flatten__", None)  # a quantized weight consists of several tensors
        parts = [getattr(tensor, name) for name in inner()[0]] if inner else [tensor]
        seen |= {part.untyped_storage().data_ptr(): part.detach() for part in parts if part is not None}
    data = [part.contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in seen.values() if part.numel()]
    left = sum(len(ZstdCompressor(level=3).compress(each)) for each in data)
    return {"weights_mib": sum(map(len, data)) / MIB, "zstd_mib": left / MIB}


class Comparison:
    """Measures what each change does to one model, beside the dense one in float32.

    `clocks` run something on a model, and return how many seconds it took.
    """

    def __init__(
        self,
        dense: nn.Module,
        clocks: Mapping[str, Callable[[nn.Module], float]],
        quality: Callable[[nn.Module], Measured],
        rounds: int,
    ) -> None:
        self.dense, self._clocks, self._quality, self._rounds = dense, clocks, quality, rounds

    def __call__(self, change: Change) -> Measured:
        """Return quality, bytes, speeds relative to the dense model, memory, and seconds to make the model."""
        models: list[nn.Module] = []
        duration = seconds(lambda: models.append(change(copy.deepcopy(self.dense))))
        model = models[0].eval()
        with torch.no_grad():
            measured = {"seconds": duration, **self._quality(model), **size_of(model)}
            for name, clock in self._clocks.items():
                dense, own = medians(partial(clock, self.dense), partial(clock, model), runs=self._rounds)
                measured[name] = dense / own
            with PeakMemory() as memory:
                list(self._clocks.values())[-1](model)
        return {**measured, "peak_mib": memory.peak / MIB}


def text_clocks(vocabulary: int) -> dict[str, Callable[[nn.Module], float]]:
    """Return what is timed for a language model."""

    def fill(size: int, model: Any) -> Any:
        ids = torch.randint(vocabulary, (size, PROMPT), generator=torch.Generator().manual_seed(0))
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def prefill(size: int, model: nn.Module) -> float:
        return seconds(lambda: fill(size, model))

    def decode(size: int, model: Any) -> float:
        cache, token = fill(size, model), torch.ones(size, 1, dtype=torch.long)

        def generate() -> None:
            for _ in range(NEW):
                model(input_ids=token, past_key_values=cache)

        return seconds(generate)

    return {f"{clock.__name__}_{size}": partial(clock, size) for clock in (prefill, decode) for size in BATCHES}


def image_clocks(shape: tuple[int, ...]) -> dict[str, Callable[[nn.Module], float]]:
    """Return what is timed for an image classifier."""

    def run(size: int, model: nn.Module) -> float:
        images = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))
        images = images.to(next(model.parameters()).dtype)
        return seconds(lambda: model(images))

    return {f"images_{size}": partial(run, size) for size in BATCHES}


def changes(
    batches: list[Any], forward: Callable[[nn.Module, Any], object], choices: Mapping[str, dict[str, Any]]
) -> dict[str, Change]:
    """Return all rows of a table but the dense one, by name."""

    def pruned(chosen: dict[str, Any], model: nn.Module, bits: int | None = None) -> nn.Module:
        prune(model, batches, **chosen, forward=partial(forward, model), progress=False)
        if chosen.get("pattern") == "structured":
            shrink(model)
        return quantized(model, bits) if bits else model

    rows: dict[str, Change] = {
        "dense, bfloat16": lambda model: model.bfloat16(),
        "int8": lambda model: quantized(model, 8),
        "int4": lambda model: quantized(model, 4),
    }
    rows |= {name: partial(pruned, chosen) for name, chosen in choices.items()}
    return rows | {"structured 25 %, int8": partial(pruned, structured("25"), bits=8)}


def text(options: argparse.Namespace) -> tuple[Comparison, dict[str, Change], Result]:
    """Prepare a language model."""
    module = CausalLMModule(options.model, dtype="float32")
    sizes = {"seqlen": options.seqlen, "num_samples": options.nsamples, "limit": options.limit}
    data = TextDataModule(module.tokenizer, options.calibration, options.eval, **sizes, seed=0)
    model, evaluated = module.model.eval(), data.evaluation_windows.split(4)

    def quality(model: Any) -> Measured:
        metric = WindowPerplexity()
        for ids in evaluated:
            metric.update(model(input_ids=ids, use_cache=False).logits.float(), ids)
        return {"perplexity": float(metric.compute())}

    def forward(model: Any, batch: Mapping[str, Tensor]) -> object:
        return model(**batch, use_cache=False)

    batches = [{"input_ids": part} for part in data.calibration_windows.split(4)]
    clocks = text_clocks(model.config.get_text_config().vocab_size)
    names = [name if name == "python-docs" else Path(name).name for name in (options.calibration, options.eval)]
    planned = Result(
        model=Path(options.model).name,
        method="dense",
        calibration=Samples(names[0], options.nsamples, options.seqlen),
        evaluation=Samples(names[1], options.limit, options.seqlen),
    )
    rows = changes(batches, forward, {**UNSTRUCTURED, **UNITS})
    return Comparison(model, clocks, quality, options.runs), rows, planned


def images_of(
    module: ImageClassifierModule, data: ImageDataModule, epochs: int, options: argparse.Namespace
) -> tuple[Comparison, dict[str, Change]]:
    """Prepare an image classifier; `epochs` of training follow some of the changes."""
    data.setup("validate")
    evaluated = list(data.val_dataloader())
    calibration = [images for images, _ in data.calibration_dataloader()]

    def quality(model: nn.Module) -> Measured:
        dtype = next(model.parameters()).dtype
        right = [(model(images.to(dtype)).argmax(dim=1) == labels).sum() for images, labels in evaluated]
        return {"top1": float(sum(right)) / sum(len(labels) for _, labels in evaluated)}

    def trained(percentage: str, model: nn.Module) -> nn.Module:
        prune(model, calibration, **structured(percentage), progress=False)
        own = ImageClassifierModule(model, num_classes=module.num_classes, lr=module.hparams["lr"])
        trainer = L.Trainer(
            devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False, callbacks=[KeepZeros()]
        )
        trainer.fit(own, data)
        shrink(model.eval())
        return model

    choices = UNSTRUCTURED | {f"structured {width} %": structured(width) for width in WIDTHS}
    rows = changes(calibration, lambda model, images: model(images), choices)
    if epochs:
        rows |= {f"structured {width} %, {epochs} epochs": partial(trained, width) for width in WIDTHS[1:]}
    shape = tuple(calibration[0].shape[1:])
    return Comparison(module.model.eval(), image_clocks(shape), quality, options.runs), rows


def digits(options: argparse.Namespace) -> Iterator[tuple[Comparison, dict[str, Change], Result]]:
    """Train the models of recipes/vision/demo.py on digits, and prepare them."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from recipes.vision import demo

    for name in demo.MODELS:
        module, data, _ = demo.train(name, 30)
        planned = Result(
            model=name,
            method="dense",
            case={"weights": fingerprint(module)},
            calibration=Samples("digits", data.num_samples),
            evaluation=Samples("digits", 360),
        )
        yield *images_of(module, data, 10, options), planned


def photos(options: argparse.Namespace) -> Iterator[tuple[Comparison, dict[str, Change], Result]]:
    """Prepare a classifier with its weights, such as EfficientNet-Lite0, and images in the layout of ImageNet."""
    module = ImageClassifierModule(f"local-dir:{options.images}")
    data = ImageDataModule(options.data, module, num_samples=options.nsamples)
    data.setup("validate")
    planned = Result(
        model=Path(options.images).name,
        method="dense",
        calibration=Samples(Path(options.data).name, options.nsamples),
        evaluation=Samples(Path(options.data).name, len(data.val_dataloader().dataset)),
    )
    yield *images_of(module, data, 0, options), planned


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="language model: hub id, folder or .gguf file")
    what.add_argument("--digits", action="store_true", help="a ViT and a ConvNeXt, trained on digits first")
    what.add_argument("--images", help="folder of a timm model with its weights")
    parser.add_argument("--data", help="images for --images: a folder with train/CLASS and val/CLASS")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--eval", default="python-docs")
    parser.add_argument("--nsamples", type=int, help="default 16; with --images 128")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40, help="windows to measure on")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", help="FOLDER of runs; a run that it holds is not measured again")
    options = parser.parse_args()
    options.nsamples = options.nsamples or (128 if options.images else 16)
    prepared = digits(options) if options.digits else photos(options) if options.images else [text(options)]
    runs, console = Runs(options.save, "worth"), Console(width=160)
    for comparison, rows, planned in prepared:
        table = None
        for name, change in {"dense": lambda model: model, **rows}.items():
            if options.rows and name not in options.rows:
                continue
            run = runs(replace(planned, method=name), partial(comparison, change))
            table = table or columns(f"{planned.model}: speeds relative to dense", "", *run.measured)
            table.add_row(name, *(f"{number:.3f}" for number in run.measured.values()))
        console.print(table or "Nothing to measure.")


if __name__ == "__main__":
    main()
