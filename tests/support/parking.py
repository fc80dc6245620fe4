"""Activations that are away while their batch waits, in a form that shows mistakes."""

import torch

from wanda_lightning.calibration.parking import HostParking

HIDDEN = {}  # activations that are away, by the memory that stands for them


class HiddenParking(HostParking):
    """Activations that are away hold no value, so that a result shows whether they were moved back before their use."""

    def __init__(self, away):
        super().__init__(torch.device("cpu:0"), away)

    def _copy(self, memory, device):
        if device == self._device:
            return HIDDEN.pop(memory._cdata)
        empty = torch.full((memory.nbytes(),), 255, dtype=torch.uint8).untyped_storage()
        HIDDEN[empty._cdata] = super()._copy(memory, device)
        return empty


def is_hidden(tensor):
    return tensor.untyped_storage()._cdata in HIDDEN
