"""Train a pruned model to predict like the dense one.

    python benchmarks/training.py --dense M.gguf --start out/thorough --goal 2:4 --train c4_sample.txt \
        --eval wikitext2_test.raw.txt --save benchmarks/results

All rows start from the same pruned folder and, for one `--text`, train on the same windows in the same order: adjacent
windows of the training text (`web`), windows that the dense model writes (`own`), or `both`, shuffled. Perplexity is
measured in float32.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from result import Result, Runs, Samples, sparsity_of
from torch import Tensor
from torch.utils.data import DataLoader

from wanda_lightning import CausalLMModule, DistillFromDense, KeepZeros, sample_windows
from wanda_lightning.data.text import cut
from wanda_lightning.data.text_sources import OWN_TEXT
from wanda_lightning.models import find_layers

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
TEXTS = {"web": "{}", "own": OWN_TEXT, "both": f"{{}} and {OWN_TEXT}"}


def training_windows(options: argparse.Namespace, dense: CausalLMModule) -> Tensor:
    """Return the windows to train on, shuffled."""
    text = Path(options.train).read_text(encoding="utf-8")
    web = cut(dense.tokenizer(text, verbose=False).input_ids, options.seqlen, None, options.train)
    parts = [web] if options.text != "own" else []
    if options.text != "web":
        file = Path(options.own_file)
        if not file.exists():
            torch.save(sample_windows(dense.model, dense.tokenizer, options.own, options.seqlen, seed=100), file)
        own = torch.load(file)
        if len(own) != options.own:
            raise ValueError(
                f"--own_file {file} has {len(own)} windows. Ask for as many with --own, or name a new file."
            )
        parts.append(own)
    windows = torch.cat(parts)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    repeated = order.repeat(-(-options.windows // len(order)))[: options.windows]
    return windows[repeated]


def loader(windows: Tensor, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """Return a loader of batches, in the order of the windows."""
    return DataLoader([{"input_ids": window} for window in windows], batch_size=batch_size)  # type: ignore[arg-type]


def perplexity(module: CausalLMModule, windows: Tensor) -> float:
    """Return the perplexity of a model."""
    (result,) = L.Trainer(devices=1, **QUIET).validate(module, loader(windows, 4), verbose=False)
    return result["val_perplexity"]


class Clock(Callback):
    """Records the time at the first batch."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: CausalLMModule, batch: object, batch_idx: int
    ) -> None:
        """Record it."""
        if batch_idx == 0:
            self.start = time.perf_counter()


def train(
    options: argparse.Namespace, dense: CausalLMModule, windows: Tensor
) -> tuple[CausalLMModule, dict[str, float]]:
    """Train one row, and return the model with its numbers."""
    L.seed_everything(options.seed, verbose=False)
    module, clock = CausalLMModule(options.start, dtype="float32", lr=options.lr, lr_decay=True), Clock()
    trainer = L.Trainer(
        devices=1,
        precision=options.precision,
        max_epochs=1,
        limit_val_batches=0,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        callbacks=[KeepZeros(), clock, DistillFromDense(dense.model)],
        **QUIET,
    )
    trainer.fit(module, loader(windows, 1))
    seconds_taken = time.perf_counter() - clock.start
    counts = [(int((layer.weight == 0).sum()), layer.size) for layer in find_layers(module.model).layers]
    zeros, sizes = (sum(column) for column in zip(*[each for each in counts if 0 < each[0] < each[1]], strict=True))
    return module, {
        "seconds": seconds_taken,
        "trained_tokens": windows.numel(),
        "sparsity": zeros / sizes,
    }


def main() -> None:
    """Train and measure the rows."""
    parser = argparse.ArgumentParser(description="Train pruned models on.")
    parser.add_argument("--dense", required=True, help="hub id, folder or .gguf file of the dense model")
    parser.add_argument("--start", required=True, help="folder of the pruned model")
    parser.add_argument("--goal", required=True, help="its sparsity: a percentage such as 50, or N:M")
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--eval", required=True, help="text to measure on")
    parser.add_argument("--windows", type=int, default=256, help="number of windows to train on")
    parser.add_argument("--text", default="both", choices=list(TEXTS), help="source of the training windows")
    parser.add_argument("--own", type=int, default=256, help="number of windows to sample from the dense model")
    parser.add_argument("--own_file", default="own_windows.pt", help="FILE that keeps the windows that it has written")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40, help="number of windows to measure on")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--accumulate", type=int, default=2, help="windows in an optimizer step")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    dense = CausalLMModule(options.dense, dtype="float32")
    windows = training_windows(options, dense)
    text = Path(options.eval).read_text(encoding="utf-8")
    tokens = dense.tokenizer(text, verbose=False).input_ids
    evaluated, data = cut(tokens, options.seqlen, options.limit, options.eval), Path(options.eval).name
    planned = Result(
        model=Path(options.dense).name,
        method="thorough",
        **sparsity_of(options.goal),
        evaluation=Samples(data, len(evaluated), options.seqlen),
    )
    runs = Runs(options.save, "training")
    start = runs(planned, lambda: {"perplexity": perplexity(CausalLMModule(options.start, dtype="float32"), evaluated)})
    trained_on = Samples(TEXTS[options.text].format(Path(options.train).name), len(windows), options.seqlen)
    case = {"windows": len(windows), "steps": math.ceil(len(windows) / options.accumulate), "text": options.text}
    planned = replace(planned, case=case, calibration=trained_on)
    print(f"{options.goal}: {start.measured['perplexity']:.2f} at the start", flush=True)
    own = () if options.text == "web" else ("own",)
    arguments = {name: str(getattr(options, name)) for name in ("lr", "accumulate", *own)}

    def measured() -> dict[str, float]:
        module, numbers = train(options, dense, windows)
        return {"perplexity": perplexity(module, evaluated), **numbers}

    runs(replace(planned, method="fixed", arguments=arguments), measured)


if __name__ == "__main__":
    main()
