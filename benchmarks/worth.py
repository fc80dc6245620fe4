"""Compare what makes a model smaller or faster: fewer bits, scattered zeros, and fewer hidden units, in one table.

    pip install torchao zstandard torch-pruning
    python benchmarks/worth.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results
    python benchmarks/worth.py --images .cache/efficientnet_lite0 --data imagenet_sample --save benchmarks/results

Speeds are ratios to the dense float32 model, which runs alternately in the same process: medians of `--runs`. `prefill`
is a forward pass of 128 tokens, `decode` the 4 tokens after them with a cache, `images` a forward pass; each for
batches of 1 and 32.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, PeakMemory, medians, seconds
from result import OURS, Result, Runs, Samples, sparsity_of
from torch import Tensor, nn

from wanda_lightning import (
    CausalLMModule,
    Distil,
    Fisher,
    ImageClassifierModule,
    ImageDataModule,
    TextDataModule,
    prune,
    shrink,
)
from wanda_lightning.modules import WindowPerplexity

BATCHES = (1, 32)
PROMPT, NEW = 128, 4  # tokens
Measured = dict[str, float]
Change = Callable[[nn.Module], nn.Module]
SCATTERED = (("best", "50"), ("thorough", "50"), ("best", "2:4"))
BY_LOSS = Fisher(num_samples=8, num_predictions=4096)  # as in the presets
WIDTHS = ("12.5", "25", "50")
PEER = "Torch-Pruning"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: Its name.
        change: Returns the changed model, given a copy of the dense one.
        goal: Percentage of zeros or N:M; with `units`, the percentage of hidden units that are taken out.
        units: Whether whole hidden units are zero.
        code: Whose implementation.
        data: Calibration samples, if they are not those of the other lines.
    """

    method: str
    change: Change
    goal: str = "0"
    units: bool = False
    code: str = OURS
    data: Samples | None = None

    def planned(self, base: Result) -> Result:
        """Return the result that the line will have."""
        pattern = {"pattern": "structured"} if self.units else {}
        own = {"method": self.method, "code": self.code, "calibration": self.data or base.calibration}
        return replace(base, **own, **{**sparsity_of(self.goal), **pattern})


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """Return the model with the weights of linear layers in a few bits, as users of torchao make it."""
    import torchao.quantization as quantization

    int4 = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig() if bits == 8 else int4)
    return model


def by_peer(ids: Tensor, goal: str, model: Any) -> nn.Module:
    """Return the model without the units that Torch-Pruning takes out of its MLPs, as in its example for LLMs."""
    import torch_pruning

    mlps = [block.mlp for block in model.model.layers]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": ids[:1], "use_cache": False},
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
            if not self._rounds:
                return measured
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
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).cache

    def prefill(size: int, model: nn.Module) -> float:
        return seconds(lambda: fill(size, model))

    def decode(size: int, model: Any) -> float:
        if size not in filled:
            filled[size] = fill(size, model)  # its keys and values have the same shapes in all models
        cache, token = copy.deepcopy(filled[size]), torch.ones(size, 1, dtype=torch.long)

        def generate() -> None:
            for _ in range(NEW):
                model(input_ids=token, cache=cache)

        return seconds(generate)

    filled: dict[int, Any] = {}
    return {f"{clock.__name__}_{size}": partial(clock, size) for clock in (prefill, decode) for size in BATCHES}


def image_clocks(shape: tuple[int, ...]) -> dict[str, Callable[[nn.Module], float]]:
    """Return what is timed for an image classifier."""

    def run(size: int, model: nn.Module) -> float:
        images = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))
        images = images.to(next(model.parameters()).dtype)
        return seconds(lambda: model(images))

    return {f"images_{size}": partial(run, size) for size in BATCHES}


def common_rows(batches: list[Any], forward: Callable[[nn.Module, Any], object]) -> list[Row]:
    """Return the lines that all models have."""

    def scattered(method: str, goal: str, model: nn.Module) -> nn.Module:
        prune(model, batches, **sparsity_of(goal), method=method, forward=partial(forward, model), progress=False)
        return model

    def narrower(goal: str, model: nn.Module, allocation: Any = "uniform", bits: int = 0) -> nn.Module:
        chosen = {"pattern": "structured", "allocation": allocation, "forward": partial(forward, model)}
        prune(model, batches, float(goal) / 100, **chosen, progress=False)
        shrink(model)
        return quantized(model, bits) if bits else model

    widths = [Row("structured", partial(narrower, goal), goal, units=True) for goal in WIDTHS]
    fisher = partial(narrower, allocation=BY_LOSS)
    return [
        Row("dense", lambda model: model),
        Row("bfloat16", lambda model: model.bfloat16()),
        Row("int8", partial(quantized, bits=8)),
        Row("int4", partial(quantized, bits=4)),
        *widths,
        *(Row("structured, fisher", partial(fisher, goal), goal, units=True) for goal in WIDTHS[:2]),
        Row("structured, int8", partial(narrower, "25", bits=8), "25", units=True),
        *(Row(method, partial(scattered, method, goal), goal) for method, goal in SCATTERED),
    ]


def text(options: argparse.Namespace) -> tuple[Comparison, list[Row], Result]:
    """Prepare a language model."""
    module = CausalLMModule(options.model, dtype="float32")
    data, longer = (
        TextDataModule(
            module.tokenizer,
            options.calibration,
            options.eval,
            seqlen=options.seqlen,
            num_samples=windows,
            limit=options.limit,
        )
        for windows in (options.nsamples, options.distil_windows)
    )
    model, evaluated = module.model.eval(), data.evaluation_windows.split(4)

    def quality(model: Any) -> Measured:
        metric = WindowPerplexity()
        for ids in evaluated:
            metric.update(model(input_ids=ids, use_cache=False).logits.float(), ids)
        return {"perplexity": float(metric.compute())}

    def forward(model: Any, batch: Mapping[str, Tensor]) -> object:
        return model(**batch, use_cache=False)

    def distilled(goal: str, model: nn.Module) -> nn.Module:
        chosen = {"pattern": "structured", "allocation": BY_LOSS, "recovery": Distil(passes=2, learning_rate=1e-3)}
        prune(model, more, float(goal) / 100, **chosen, forward=partial(forward, model), progress=False)
        shrink(model)
        return model

    batches, more = ([{"input_ids": part} for part in each.calibration_windows.split(4)] for each in (data, longer))
    clocks = text_clocks(model.config.get_text_config().vocab_size)
    names = [name if name == "python-docs" else Path(name).name for name in (options.calibration, options.eval)]
    planned = Result(
        model=Path(options.model).name,
        method="dense",
        calibration=Samples(names[0], options.nsamples, options.seqlen),
        evaluation=Samples(names[1], options.limit, options.seqlen),
    )
    ids, samples = data.calibration_windows, Samples(names[0], options.distil_windows, options.seqlen)
    rows = [
        *common_rows(batches, forward),
        *(Row("GroupMagnitude", partial(by_peer, ids, goal), goal, units=True, code=PEER) for goal in WIDTHS[:2]),
        *(
            Row("structured, distilled", partial(distilled, goal), goal, units=True, data=samples)
            for goal in WIDTHS[:2]
        ),
    ]
    return Comparison(model, clocks, quality, options.runs), rows, planned


def photos(options: argparse.Namespace) -> tuple[Comparison, list[Row], Result]:
    """Prepare a classifier with its weights, such as EfficientNet-Lite0, and images in the layout of ImageNet."""
    module = ImageClassifierModule(f"timm:local-dir:{options.images}")
    data = ImageDataModule(options.data, module, num_samples=options.nsamples)
    data.setup("validate")
    evaluated = list(data.val_dataloader())
    calibration = [images for images, _ in data.calibration_dataloader()]
    count = sum(len(labels) for _, labels in evaluated)

    def quality(model: nn.Module) -> Measured:
        dtype = next(model.parameters()).dtype
        right = [(model(images.to(dtype)).argmax(dim=1) == labels).sum() for images, labels in evaluated]
        return {"top1": float(sum(right)) / count}

    rows = common_rows(calibration, lambda model, images: model(images))
    name = Path(options.data).name
    planned = Result(
        model=Path(options.images).name,
        method="dense",
        calibration=Samples(name, options.nsamples),
        evaluation=Samples(name, count),
    )
    clocks = image_clocks(tuple(calibration[0].shape[1:]))
    return Comparison(module.model.eval(), clocks, quality, options.runs), rows, planned


def main() -> None:
    """Measure the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="language model: hub id, folder or .gguf file")
    what.add_argument("--images", help="folder of a timm model with its weights")
    parser.add_argument("--data", help="images for --images: a folder with train/CLASS and val/CLASS")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--eval", default="python-docs")
    parser.add_argument("--nsamples", type=int, help="default 16; with --images 128")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40, help="windows to measure on")
    parser.add_argument("--distil_windows", type=int, default=128, help="windows to calibrate and distil with")
    parser.add_argument("--rows", nargs="+", help="only these methods")
    parser.add_argument("--runs", type=int, default=2, help="0 measures no speeds and no memory")
    parser.add_argument("--save", help="FOLDER of runs; a run that it holds is not measured again")
    options = parser.parse_args()
    options.nsamples = options.nsamples or (128 if options.images else 16)
    comparison, rows, base = photos(options) if options.images else text(options)
    runs = Runs(options.save, "worth")
    for row in rows:
        if not options.rows or row.method in options.rows:
            runs(row.planned(base), partial(comparison, row.change))


if __name__ == "__main__":
    main()
