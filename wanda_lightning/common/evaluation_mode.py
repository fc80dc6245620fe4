"""Run a model in evaluation mode, with random numbers from a seed, or in one thread."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Switch to evaluation mode; restore the mode of each module at the end.

    A module that overrides `train`, as loralib does, is restored by its own.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        # Outer modules first: an override may set the modules inside.
        for module, mode in modes.items():
            overrides = getattr(module.train, "__func__", None) is not Module.train
            if overrides and module.training != mode:
                module.train(mode)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the random numbers of the CPU and of a device from a seed; restore their states at the end."""
    if device.type == "cpu":
        devices = []
        seed_generators = torch.default_generator.manual_seed
    else:
        devices = [device]
        seed_generators = torch.manual_seed  # of all devices
    with torch.random.fork_rng(devices, device_type=device.type):
        seed_generators(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread of the CPU, as is best for batches of a few tokens.

    The threads of OpenMP spin while they wait for each other: beside other programs, `shrink` took 5 to 9 times as
    long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
