"""Activations that are away while their batch waits, in a form that shows mistakes."""

import torch

from wanda_lightning.calibration.transfers import Arrival, Transfers

HIDDEN = {}  # activations that are away, by the memory that stands for them


class HiddenTransfers(Transfers):
    """Memory that is away, or that is not waited for, holds no value: results show whether it is used at that time."""

    def __init__(self):
        super().__init__(torch.device("cpu:0"))

    def leave(self, memory):
        hidden = _without_value(memory)
        HIDDEN[hidden._cdata] = super().leave(memory)
        return hidden

    def begin_return(self, memory):
        key, copy = memory._cdata, _without_value(memory)
        return Arrival(copy, lambda: copy.copy_(HIDDEN.pop(key)))


def is_hidden(tensor):
    return tensor.untyped_storage()._cdata in HIDDEN


def _without_value(memory):
    return torch.full((memory.nbytes(),), 255, dtype=torch.uint8).untyped_storage()
