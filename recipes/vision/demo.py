"""Train a small ViT and a small ConvNeXt on scanned digits, prune each, and measure their accuracy.

    make demo-vision                   (runs this script)
    python recipes/vision/demo.py --epochs 30

Result: docs/measured.md has the table. At 50 % and at 2:4, magnitude and Wanda lose at most 2 % of 360 held-out digits.
The digits are the 1,797 scans in scikit-learn, of which four fifths are for training, so nothing is downloaded.
"""

import argparse
import copy
import logging
import os
import time
import warnings

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads soon leave the cores to others

import lightning as L
from rich.console import Console
from rich.table import Table

from wanda_lightning import ImageClassifierModule, ImageDataModule, PruningCallback, WandaPrune

# Names of timm, with arguments that make the models small enough for digits and for a CPU.
MODELS = {
    "vit_tiny_patch16_224": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
    },
    "convnext_atto": {"dims": (24, 48, 96, 128), "depths": (1, 1, 2, 1), "patch_size": 2},
}


def run(
    module: ImageClassifierModule,
    data: ImageDataModule,
    callback: PruningCallback | None,
    epochs: int = 0,
) -> float:
    """Train for some epochs, or only measure, and return the accuracy on the held-out digits."""
    trainer = L.Trainer(
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback] if callback else [],
    )
    if epochs:
        trainer.fit(module, data)
    else:
        trainer.validate(module, data, verbose=False)  # the callback prunes before it begins
    return float(trainer.callback_metrics["val_accuracy"])


def train(name: str, epochs: int) -> tuple[ImageClassifierModule, ImageDataModule, float]:
    """Train one of the models on digits. Return it with its data and its accuracy on the held-out digits."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 calls torch 2.13 in a deprecated way.
    warnings.filterwarnings("ignore", message=".*LeafSpec")
    L.seed_everything(0, verbose=False)
    sizes = {"in_chans": 1, **MODELS[name]}  # one channel: the digits are gray
    module = ImageClassifierModule(
        name, pretrained=False, num_classes=10, model_kwargs=sizes, lr=2e-3
    )
    data = ImageDataModule("digits", module, batch_size=128, num_samples=1024, image_size=32)
    return module, data, run(module, data, None, epochs)


def main() -> None:
    """Train each model once, then prune fresh copies of it."""
    parser = argparse.ArgumentParser(description="Prune small image classifiers trained on digits.")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()

    table = Table(title="Accuracy on 360 held-out digits")
    for heading in ("model", "method", "pattern"):
        table.add_column(heading)
    for heading in ("sparsity", "model sparsity", "accuracy", "seconds"):
        table.add_column(heading, justify="right")

    for name in MODELS:
        started = time.perf_counter()
        module, data, accuracy = train(name, options.epochs)
        seconds = time.perf_counter() - started
        table.add_row(name, "dense", "", "", "", f"{accuracy:.2%}", f"{seconds:.1f}")

        # Each method prunes the trained weights, not what the method before it has left.
        dense = copy.deepcopy(module.state_dict())
        for pattern in ("unstructured", "2:4"):
            callbacks = {
                "magnitude": PruningCallback(0.5, method="magnitude", pattern=pattern),
                "wanda": WandaPrune(0.5, pattern=pattern, num_samples=1024),
            }
            for method, callback in callbacks.items():
                module.load_state_dict(dense)
                started = time.perf_counter()
                accuracy = run(module, data, callback)
                seconds = time.perf_counter() - started
                report = callback.report
                table.add_row(
                    name,
                    method,
                    pattern,
                    f"{report.sparsity:.2%}",
                    f"{report.model_sparsity:.2%}",
                    f"{accuracy:.2%}",
                    f"{seconds:.1f}",
                )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
