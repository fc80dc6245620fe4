"""Accuracy of a small network that is pruned with and without the correction of its BatchNorm statistics.

    OMP_NUM_THREADS=1 python benchmarks/batch_norm.py --save benchmarks/results
    python benchmarks/batch_norm.py --model efficientnet --methods wanda_none wanda_block

A ResNet-18 with a quarter of the channels, or timm's smallest EfficientNet (whose depthwise convolutions stay dense),
is trained on the scanned digits of scikit-learn, resized to 32 x 32 pixels, for 12 epochs. Calibration takes 256
training images in batches of 64. Each cell holds the accuracy on 360 held-out digits without and with the correction.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import timm
import torch
from measuring import fingerprint, run_from_shell
from result import Result, Runs, Samples, sparsity_of
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from wanda_lightning import prune
from wanda_lightning.methods import PRESETS, SEQUENTIAL_CHOICES

METHODS = {"magnitude": {"method": "magnitude"}}
for method, sequential in product(("wanda", "sparsegpt"), reversed(SEQUENTIAL_CHOICES)):
    METHODS[f"{method}_{sequential}"] = {"method": method, "sequential": sequential}
for preset in PRESETS:
    if preset != "fast":  # it is `wanda_none`
        METHODS[preset] = {"method": preset}

GOALS = ("50", "60", "70", "2:4")
EPOCHS = 12
BATCH = 64
MODELS = {
    "resnet": {"model_name": "resnet18", "channels": (16, 32, 64, 128)},
    "efficientnet": {"model_name": "test_efficientnet"},
}


def digits():
    """Return normalized images of 32 x 32 pixels and their labels, for training and for evaluation."""
    scans = load_digits()
    # Pixels are from 0 to 16. The factor makes them whole numbers up to 255, as in an image file.
    pixels = torch.from_numpy((scans.images * (255 / 16)).round()).float()[:, None] / 255
    images = F.interpolate(pixels, size=(32, 32), mode="bicubic", align_corners=False)
    images = (images - 0.3) / 0.37
    labels = torch.from_numpy(scans.target)

    training, evaluation = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=scans.target
    )
    return (images[training], labels[training]), (images[evaluation], labels[evaluation])


def train(name, inputs, labels):
    """Train one of the models on randomly shifted images."""
    torch.manual_seed(0)
    model = timm.create_model(**MODELS[name], in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    steps = len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * steps)

    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs))[: steps * BATCH]  # without the last, smaller batch
        for batch in order.split(BATCH):
            shift = torch.randint(-3, 4, (2,)).tolist()
            shifted = torch.roll(inputs[batch], shift, (2, 3))
            F.cross_entropy(model(shifted), labels[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model, inputs, labels):
    """Return the fraction of images that a model classifies correctly."""
    return float((model(inputs).argmax(dim=1) == labels).float().mean())


def measure(dense, batches, evaluation, choices):
    """Prune two copies and return their accuracy, without and with the correction."""
    measured = {}
    for name, keep_batch_norm in (("top1_uncorrected", True), ("top1", False)):
        model = copy.deepcopy(dense)
        prune(model, batches, **choices, keep_batch_norm=keep_batch_norm, progress=False)
        measured[name] = accuracy(model, *evaluation)
    return measured


def main(
    *,
    model: str = "resnet",
    methods: Sequence[str] = tuple(METHODS),
    save: str = "",
):
    """Train once, then prune copies."""
    training, evaluation = digits()
    dense = train(model, *training)
    order = torch.randperm(len(training[0]), generator=torch.Generator().manual_seed(0))
    batches = list(training[0][order[:256]].split(64))

    runs = Runs(save, "batch_norm")
    trained = Result(
        model=model,
        method="dense",
        case={"weights": fingerprint(dense)},
        evaluation=Samples("digits", len(evaluation[0])),
    )
    runs(trained, lambda: {"top1": accuracy(dense, *evaluation)})

    calibrated = replace(trained, calibration=Samples("digits", 256))
    for method, goal in product(methods, GOALS):
        choices = METHODS[method]
        planned = replace(calibrated, method=method, **sparsity_of(goal), arguments=choices)
        runs(planned, partial(measure, dense, batches, evaluation, choices | sparsity_of(goal)))


if __name__ == "__main__":
    run_from_shell(main)
