"""Run a model in evaluation mode, with random numbers from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; restore the mode of each module at the end.

    A module that overrides `train`, as loralib does, is restored by its own.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for (
            module,
            mode,
        ) in modes.items():  # outer modules first: an override may set the modules inside
            overrides = getattr(module.train, "__func__", None) is not nn.Module.train
            if overrides and module.training != mode:
                module.train(mode)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the random numbers of the CPU and of a device from a seed; restore their states at the end."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
        (torch.default_generator if on_cpu else torch).manual_seed(seed)  # torch seeds all devices
        yield
