"""Choose where the activations of waiting batches are, while a model is read block by block."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from wanda_lightning.calibration.parking import DiskParking, Host, HostParking, MakeParking, Parking
from wanda_lightning.methods import PARKING


def refuse_parking(park: str, device: str) -> None:
    """Refuse an unknown place for activations, and one that does not suit the device of the model."""
    if park not in PARKING:
        raise ValueError(f"park must be one of {', '.join(PARKING)}, but it is {park!r}.")
    if not isinstance(device, str):
        raise ValueError(f"device must be a text such as 'cpu' or 'cuda:0', but it is {device!r}.")
    is_cpu = device.startswith("cpu")
    if park == "disk" and not is_cpu:
        raise ValueError(
            f"park='disk' moves activations out of the memory of the CPU, but device={device!r} has its own. Use "
            "park='cpu', which moves them to the memory of the CPU, or device='cpu'."
        )
    if park == "cpu" and is_cpu:
        raise ValueError(
            f"park='cpu' moves activations from the device to the memory of the CPU, but device={device!r} keeps them "
            "there anyway. Use park='memory', or park='disk' if they do not fit."
        )


def parking_maker(park: str, device: torch.device, folder: Path) -> MakeParking:
    """Return what makes the parking of a batch; `folder` is for files."""
    if park == "disk":
        return partial(DiskParking, folder)
    return partial(HostParking, Host(device)) if park == "cpu" else Parking
