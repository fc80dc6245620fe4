"""Train a pruned model to predict like the dense one.

    python benchmarks/training.py --dense M.gguf --start out/thorough --goal 2:4 --train c4_sample.txt \
        --eval wikitext2_test.raw.txt --save benchmarks/results
    python benchmarks/training.py --dense M.gguf --start out/thorough --goal 2:4 --train c4_sample.txt --held_out
    python benchmarks/training.py --images --lr 5e-4 --save benchmarks/results

All rows start from the same pruned folder and, for one `--text`, train on the same windows in the same order: adjacent
windows of the training text (`web`), windows that the dense model writes (`own`), or `both`, shuffled. `--held_out`
leaves every eighth window of the training text out of training and measures on these windows, to choose
hyperparameters. Perplexity is measured in float32.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from measuring import fingerprint, seconds
from result import Result, Runs, Samples, sparsity_of
from torch import Tensor
from torch.utils.data import DataLoader

from wanda_lightning import (
    CausalLMModule,
    DistillFromDense,
    ImageClassifierModule,
    ImageDataModule,
    KeepZeros,
    PruningCallback,
    sample_windows,
)
from wanda_lightning.data.text_sources import OWN_TEXT
from wanda_lightning.data.windows import cut
from wanda_lightning.models import Layer
from wanda_lightning.training.held_zeros import prunable_layers

HELD_OUT = 8  # every eighth window of the training text
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
TEXTS = {"web": "{}", "own": OWN_TEXT, "both": f"{{}} and {OWN_TEXT}"}


def training_windows(options: argparse.Namespace, dense: CausalLMModule) -> tuple[Tensor, Tensor]:
    """Return the windows to train on, shuffled, and the held-out windows of the training text."""
    text = Path(options.train).read_text(encoding="utf-8")
    web = cut(dense.tokenizer(text, verbose=False).input_ids, options.seqlen, None, options.train)
    is_held = torch.arange(len(web)) % HELD_OUT == HELD_OUT - 1
    parts = [web[~is_held] if options.held_out else web] if options.text != "own" else []
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
    return windows[repeated], web[is_held]


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
    layers = pruned_layers(module).values()
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return module, {
        "seconds": seconds_taken,
        "trained_tokens": windows.numel(),
        "sparsity": zeros / sum(layer.size for layer in layers),
    }


def pruned_layers(module: CausalLMModule) -> dict[str, Layer]:
    """Return the layers that have zeros."""
    layers = prunable_layers(module.model)
    return {layer.name: layer for layer in layers if 0 < int((layer.weight == 0).sum()) < layer.size}


def train_images(options: argparse.Namespace) -> None:
    """Prune a ViT and a ConvNeXt that are trained on digits, train them on, and measure them."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from recipes.vision import demo

    runs = Runs(options.save, "training_images")
    for name in demo.MODELS:
        module, data, accuracy = demo.train(name, options.epochs)
        dense, module.lr = copy.deepcopy(module.state_dict()), options.lr
        trained = Result(
            model=name, method="dense", case={"weights": fingerprint(module)}, evaluation=Samples("digits", 360)
        )
        runs(trained, lambda accuracy=accuracy: {"top1": accuracy})

        def fit(module: ImageClassifierModule, data: ImageDataModule, *callbacks: Callback) -> dict[str, float]:
            L.seed_everything(options.seed, verbose=False)
            trainer = L.Trainer(devices=1, max_epochs=options.more_epochs, callbacks=[*callbacks], **QUIET)
            taken = seconds(lambda: trainer.fit(module, data))
            return {"top1": float(trainer.callback_metrics["val_accuracy"]), "seconds": taken}

        arguments = {"lr": str(options.lr), "epochs": str(options.more_epochs)}
        longer = replace(trained, method="trained longer", arguments=arguments)
        runs(longer, partial(fit, module, data))
        for goal in options.goals:
            chosen = {**sparsity_of(goal), "method": "best", "num_samples": data.num_samples}
            module.load_state_dict(dense)
            pruned = replace(trained, method="best", **sparsity_of(goal))
            runs(pruned, lambda chosen=chosen, m=module, d=data: {"top1": demo.run(m, d, PruningCallback(**chosen))})
            module.load_state_dict(dense)
            callbacks = PruningCallback(**chosen), DistillFromDense()
            runs(replace(pruned, method="fixed", arguments=arguments), partial(fit, module, data, *callbacks))


def main() -> None:
    """Train and measure the rows."""
    parser = argparse.ArgumentParser(description="Train pruned models on.")
    parser.add_argument("--dense", help="hub id, folder or .gguf file of the dense model")
    parser.add_argument("--start", help="folder of the pruned model")
    parser.add_argument("--goal", help="its sparsity: a percentage such as 50, or N:M")
    parser.add_argument("--train", help="text to train on")
    parser.add_argument("--eval", help="text to measure on; not needed with --held_out")
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
    parser.add_argument("--held_out", action="store_true")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    parser.add_argument("--images", action="store_true", help="image classifiers instead of a language model")
    parser.add_argument("--goals", nargs="+", default=["70", "80", "90"], help="their sparsities, in percent")
    parser.add_argument("--epochs", type=int, default=30, help="epochs in which they are trained")
    parser.add_argument("--more_epochs", type=int, default=10, help="epochs in which they are trained on")
    options = parser.parse_args()
    if options.images:
        train_images(options)
        return
    if missing := [name for name in ("dense", "start", "goal", "train") if getattr(options, name) is None]:
        parser.error(f"--{missing[0]} must be given, except with --images.")

    dense = CausalLMModule(options.dense, dtype="float32")
    windows, held_out = training_windows(options, dense)
    if options.held_out:
        evaluated, data = held_out[: options.limit], f"{Path(options.train).name}, held out"
    else:
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
