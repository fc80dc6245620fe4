"""Variants of `best` and of `Distil` on an image classifier with its weights (docs/tried.md).

    python benchmarks/tried_photos.py --photos .cache/efficientnet_lite0 --data imagenet_sample --goal 50

`--nsamples` of the training images are for calibration, and the next 488 are only measured on. For each variant and
pass: the held-out loss, how many held-out images have the class that the dense model gives them, and for the images
that calibration does not use, the mean divergence from the dense predictions and the share with the class of the dense
model.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from wanda_lightning import ADMM, Distil, ImageClassifierModule, ImageDataModule, PruningConfig, Reconstruct, prune
from wanda_lightning.calibration import gradients
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.core.losses import divergence
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.training import distil, reconstruct
from wanda_lightning.training.masked_weights import MaskedWeights
from wanda_lightning.training.predictions import predictions_of
from wanda_lightning.training.recovery import DenseModel

UNSEEN = 488
_Distillation = distil._Distillation


class Photos:
    """The model, its images, and the weights before and after `best`."""

    def __init__(self, options: argparse.Namespace) -> None:
        module = ImageClassifierModule(f"timm:local-dir:{options.photos}")
        data = ImageDataModule(options.data, module, num_samples=options.nsamples + UNSEEN)
        data.setup("validate")
        self.model = module.model.eval()
        images = torch.cat([images for images, _ in data.calibration_dataloader()])
        self.calibration, self.unseen = images[: options.nsamples], images[options.nsamples :]
        self.goal: dict[str, Any] = {"sparsity": 0.5, "pattern": "2:4"}
        if ":" not in options.goal:
            self.goal = {"sparsity": float(options.goal) / 100}
        self.dense, self.expected = copy.deepcopy(self.model.state_dict()), self.outputs(self.unseen)
        self.pruned: dict[str, Tensor] = {}

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """Return the logits."""
        training = self.model.training
        logits = torch.cat([self.model.eval()(part) for part in images.split(16)])
        self.model.train(training)
        return logits

    def measured(self) -> str:
        """Measure on images that calibration does not use."""
        found = self.outputs(self.unseen)
        same = float((found.argmax(dim=1) == self.expected.argmax(dim=1)).double().mean())
        return (
            f"unseen: divergence {float(divergence(found, self.expected)[0]) / len(found):.4f}, same class {same:.1%}"
        )

    def prune(self, images: Tensor | None = None, method: str = "best", **chosen: Any) -> None:
        """Prune the dense model."""
        self.model.load_state_dict(self.dense)
        images, chosen = self.calibration if images is None else images, {"sequential": "layer", **chosen}
        prune(self.model, list(images.split(64)), method=method, **self.goal, **chosen, progress=False)

    def distil(self, config: Distil, images: Tensor) -> None:
        """Train the model that `best` pruned."""
        self.model.load_state_dict(self.dense)
        plan = make_plan(PruningConfig.from_names(method="best", **self.goal), self.model)
        samples = Samples(self.model, images.split(64), None, None, SINGLE_PROCESS, "batches")
        with pruning_mode(self.model):
            run = config.start_model(DenseModel(self.model, plan.layers, plan.blocks, samples, SINGLE_PROCESS, False))
            self.model.load_state_dict(self.pruned)
            run.train()


@contextmanager
def followed(photos: Photos, falling: bool) -> Iterator[None]:
    """Print the results of each pass.

    With `falling`, a pass that raises the held-out loss is undone, and halves the learning rate of the later ones.
    """
    weights: list[MaskedWeights] = []
    factor, lowest = [1.0], [float("inf")]

    def mean_loss(self: Any, chosen: Any) -> float:
        loss = mean_loss_of(self, chosen)
        assert loss is not None
        right = 0
        for sample, target, _ in self._own(chosen):
            found, dense = predictions_of(sample.predict()), target.predictions()(slice(None))
            right += int((found.argmax(dim=1) == dense.argmax(dim=1)).sum())
        print(f"  held-out loss {loss:.4f}, {right} of {len(chosen)} right; {photos.measured()}", flush=True)
        if falling and loss > lowest[0]:
            factor[0] /= 2
            with torch.no_grad():
                for parameter, best in zip(weights[0]._parameters, weights[0]._best, strict=True):
                    parameter.copy_(best)
        lowest[0] = min(lowest[0], loss)
        return loss

    def optimizer(self: Any, masked: MaskedWeights, steps: int) -> Any:
        weights[:] = [masked]
        made, schedule = optimizer_of(self, masked, steps)
        usual = schedule.lr_lambdas[0]
        schedule.lr_lambdas = [lambda step: factor[0] * usual(step)] * len(schedule.lr_lambdas)
        return made, schedule

    mean_loss_of, optimizer_of = _Distillation._mean_loss, _Distillation._optimizer
    with (
        patch.object(_Distillation, "_mean_loss", torch.no_grad()(mean_loss)),
        patch.object(_Distillation, "_optimizer", optimizer),
    ):
        yield


@contextmanager
def random_signs() -> Iterator[None]:
    """Pass `sqrt(p) * v - p * (sqrt(p) @ v)` backward, with random signs v, instead of `p` minus a drawn label."""
    generator = torch.Generator().manual_seed(0)

    def apply(logits: Tensor, slopes: Tensor) -> Tensor:
        p = logits.detach().softmax(dim=-1)
        signed = p.sqrt() * (torch.randint(2, p.shape, generator=generator) * 2 - 1)
        used = slopes.any(dim=-1, keepdim=True)  # not the samples beyond the limit
        return apply_of(logits, (signed - p * signed.sum(dim=-1, keepdim=True)) * used)

    apply_of: Callable[..., Tensor] = gradients._WithGradient.apply
    with patch.object(gradients._WithGradient, "apply", apply):
        yield


@contextmanager
def averaged(constant: bool) -> Iterator[None]:
    """Try the mean of the weights after each step of the last pass instead of those at its end.

    With `constant`, the learning rate does not fall after it warms up.
    """
    weights: list[MaskedWeights] = []
    totals: list[Tensor] = []
    counts = {"passes": 0, "steps": 0}

    def step(self: MaskedWeights, *args: Any) -> float:
        loss = step_of(self, *args)
        weights[:] = [self]
        if counts["passes"] == 3:  # the loss was measured before training and after two passes
            values = [parameter.detach() for parameter in self._parameters]
            totals[:] = [a + b for a, b in zip(totals, values, strict=True)] if totals else [v.clone() for v in values]
            counts["steps"] += 1
        return loss

    def mean_loss(self: Any, chosen: Any) -> float:
        loss = mean_loss_of(self, chosen)
        counts["passes"] += 1
        if counts["passes"] == 4:
            with torch.no_grad():
                for parameter, total in zip(weights[0]._parameters, totals, strict=True):
                    parameter.copy_(total / counts["steps"])
            loss = mean_loss_of(self, chosen)
        return loss

    def optimizer(self: Any, masked: MaskedWeights, steps: int) -> Any:
        made, schedule = optimizer_of(self, masked, steps)
        if constant:
            schedule.lr_lambdas = [lambda step: min(1.0, (step + 1) / 4)] * len(schedule.lr_lambdas)
        return made, schedule

    step_of, mean_loss_of, optimizer_of = MaskedWeights.step, _Distillation._mean_loss, _Distillation._optimizer
    with (
        patch.object(MaskedWeights, "step", step),
        patch.object(_Distillation, "_mean_loss", mean_loss),
        patch.object(_Distillation, "_optimizer", optimizer),
    ):
        yield


def tried_rate(photos: Photos, rates: list[float], steps: int = 16) -> float:
    """Return the learning rate with the lowest held-out loss after a few steps with each.

    All samples are held out that `Distil` holds out.
    """
    found: dict[float, float] = {}
    start = _Distillation.__init__

    def shorter(self: Any, config: Distil, dense: DenseModel) -> None:
        start(self, config, dense)
        self._trained = self._trained[: steps * self._batch_size]

    def mean_loss(self: Any, chosen: Any) -> float:
        found[rate] = mean_loss_of(self, chosen)  # the last one is after training
        return found[rate]

    mean_loss_of = _Distillation._mean_loss
    with patch.object(_Distillation, "__init__", shorter), patch.object(_Distillation, "_mean_loss", mean_loss):
        for rate in rates:
            photos.distil(Distil(passes=1, learning_rate=rate), photos.calibration)
    print(f"  held-out losses after {steps} steps: {found}", flush=True)
    return min(found, key=lambda rate: found[rate])


@contextmanager
def dense_convolutions(model: nn.Module) -> Iterator[None]:
    """Train the convolutions that are not pruned, too."""
    start = _Distillation.__init__

    def longer(self: Any, config: Distil, dense: DenseModel) -> None:
        start(self, config, dense)
        own = {id(parameter) for parameter in self._parameters}
        self._parameters += [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and id(m.weight) not in own]

    with patch.object(_Distillation, "__init__", longer):
        yield


def crops(images: Tensor, versions: int) -> Tensor:
    """Return the images with random crops, of which half are mirrored."""
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(images.shape[-1], scale=(0.35, 1), interpolation=v2.InterpolationMode.BICUBIC)
    change = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return torch.cat([images, *(torch.stack([change(image) for image in images]) for _ in range(versions - 1))])


@contextmanager
def steps_of(samples: int) -> Iterator[None]:
    """Let `Reconstruct` take another number of samples in a step."""
    with patch.object(reconstruct, "_SAMPLES", samples):
        yield


@contextmanager
def dense_targets(photos: Photos) -> Iterator[None]:
    """Let blocks learn what the dense blocks gave in the dense model, instead of what they give on present inputs."""
    known: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        known.setdefault(name, []).append(output.clone())

    blocks = {name: block for name, block in photos.model.named_modules() if name.count(".") == 2}
    photos.model.load_state_dict(photos.dense)
    with ExitStack() as hooks, torch.no_grad():
        for name, block in blocks.items():
            hooks.callback(block.register_forward_hook(partial(keep, name)).remove)
        for part in photos.calibration.split(64):
            photos.model.eval()(part)

    def record(self: Any, call: Any, module: nn.Module, args: object, output: object) -> None:
        self.runs.append(reconstruct._Run(call, self.inputs, known[self.name][call.sample.batch_index], None))

    with patch.object(reconstruct._Part, "record_output", record):
        yield


def main() -> None:
    """Measure the variants, one after another."""
    parser = argparse.ArgumentParser(description="Variants of best and Distil on images.")
    parser.add_argument("--photos", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--nsamples", type=int, default=512)
    parser.add_argument("--goal", default="2:4")
    parser.add_argument("--variants", nargs="+", default=["best", "distil", "falling"])
    options = parser.parse_args()
    photos = Photos(options)
    changes: dict[str, dict[str, Any]] = {
        "best": {},
        **{
            f"{method}_{order}": {"method": method, "sequential": order}
            for method in ("sparsegpt", "balanced", "best")
            for order in ("none", "block", "layer")
        },
        "dampening": {"solver": ADMM(dampening=0.2)},
        "best_crops": {"images": crops(photos.calibration, 4)},
    }
    blocks: dict[str, tuple[AbstractContextManager[None], Reconstruct]] = {
        "blocks": (nullcontext(), Reconstruct()),
        "blocks_4": (steps_of(4), Reconstruct()),
        "blocks_64": (steps_of(64), Reconstruct()),
        "blocks_64_epochs_16": (steps_of(64), Reconstruct(epochs=16)),
        "blocks_64_dense_targets": (steps_of(64), Reconstruct()),
    }
    if not set(options.variants) <= set(blocks):
        photos.prune()
    photos.pruned = copy.deepcopy(photos.model.state_dict())
    for name in options.variants:
        print(options.goal, options.nsamples, name, flush=True)
        if name == "random_signs":
            with random_signs():
                photos.prune()
            print(f"  {photos.measured()}", flush=True)
            continue
        if name in blocks:
            change, recovery = blocks[name]
            targets = dense_targets(photos) if name.endswith("_targets") else nullcontext()
            with change, targets:
                photos.prune(recovery=recovery, sequential="none")
            print(f"  {photos.measured()}", flush=True)
            continue
        if name in changes:
            if name != "best":
                photos.prune(**changes[name])
            else:
                photos.model.load_state_dict(photos.pruned)
            print(f"  {photos.measured()}", flush=True)
            continue
        images = crops(photos.calibration, 4) if name.startswith("crops") else photos.calibration
        config = Distil(passes=1) if name == "crops" else Distil(passes=3)
        if name.startswith("passes_"):
            config = Distil(passes=int(name.removeprefix("passes_")))
        if name.startswith("rate_"):
            config = Distil(passes=3, learning_rate=float(name.removeprefix("rate_")))
        if name == "tried_rates":
            config = Distil(passes=3, learning_rate=tried_rate(photos, [4e-5, 1.25e-4, 4e-4]))
            print(f"  {config}", flush=True)
        if name == "reconstruct_first":
            photos.prune(recovery="reconstruct", sequential="block")
            photos.pruned = copy.deepcopy(photos.model.state_dict())
        with followed(photos, name == "falling"):
            if name == "dense_convolutions":
                with dense_convolutions(photos.model):
                    photos.distil(config, images)
            elif name.startswith("averaged"):
                with averaged(name == "averaged_constant"):
                    photos.distil(config, images)
            else:
                photos.distil(config, images)
        print(f"  kept: {photos.measured()}", flush=True)


if __name__ == "__main__":
    main()
