"""Find NaN, infinity and overflow in activations, and report their location.

Reading each check immediately would make the CPU wait for the device once per batch and layer. Therefore the checks of
a unit stay on the device and are read together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.types import Tokens
from wanda_lightning.parallel import Processes


class Check(NamedTuple):
    """Whether the sums over one input of one batch are finite, and which token to report if they are not."""

    layers: list[str]  # names of the layers with this input
    batch: int
    finite: Tensor  # a boolean scalar on the input's device
    row: Tensor  # index of the token among those that count, on the input's device
    shape: tuple[int, ...]  # of all tokens: samples first, if there is more than one dimension
    keep: Tensor | None  # which tokens count; None if all of them do

    @property
    def place(self) -> str:
        """The sample and position of the token in the batch."""
        row = self.row if self.keep is None else self.keep.flatten().nonzero()[int(self.row), 0]
        sample, *token = (int(index) for index in torch.unravel_index(row, self.shape))
        return f"sample {sample}, token {', '.join(map(str, token))}" if token else f"row {sample}"


def token_to_report(finite: Tensor, tokens: Callable[[], Tokens]) -> Tensor:
    """Return the index of the token with the largest absolute value, or NaN; 0 if the sums are known to be finite.

    On a CPU, `tokens` is called only if the sums are not finite; on other devices always, because reading the flag
    would wait for the device.
    """
    if finite.device.type == "cpu" and finite:
        return torch.zeros((), dtype=torch.int64)
    rows = tokens()
    return torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).nan_to_num(nan=torch.inf, posinf=torch.inf).argmax()


def refuse_nonfinite(checks: Sequence[Check], processes: Processes) -> None:
    """Read all checks, and refuse sums that are not finite."""
    by_device: dict[torch.device, list[Tensor]] = {}  # a model may use several devices
    for check in checks:
        by_device.setdefault(check.finite.device, []).append(check.finite)
    if all(torch.stack(flags).all() for flags in by_device.values()):
        return
    bad = next(check for check in checks if not check.finite)
    whose = f" of process {processes.rank}" if processes.world_size > 1 else ""
    raise UserError(
        f"calibration batches must give finite activations, but the input of {', '.join(bad.layers)} holds NaN or "
        f"infinity, or its squares overflow float32, in calibration batch {bad.batch}{whose} (counted from 0), at "
        f"{bad.place}. Check that batch, or load the model in a wider dtype (float32 or bfloat16 rather than float16)."
    )
