"""The state of a pruning callback, as checkpoints store it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.report import PruningReport


@dataclass
class PruningState:
    """The progress of a callback. It does not store which weights are zero, since the weights show it."""

    choices: dict[str, Any]  # which a resumed run must not change
    zeros: dict[str, int] = field(default_factory=dict)  # number by pruned layer
    share: float = 0.0  # of the final sparsity
    asked_at: int | None = None  # optimizer step of the latest call of `should_prune`
    due: bool = False  # prune at the end of the next validation loop
    unheld_zeros: dict[str, Tensor] = field(default_factory=dict)  # see `HeldZeros.unheld_zeros`
    report: PruningReport | None = None  # of the latest pruning

    def record(self, report: PruningReport, share: float) -> None:
        """Record that the model was pruned to a share of the final sparsity."""
        # Layers that this stage did not prune keep their counts. A layer that is all zeros was initialized so, and may
        # train.
        self.zeros |= {layer.name: layer.zeros for layer in report.layers if 0 < layer.sparsity < 1}
        self.report, self.share, self.due = report, share, False

    def describes(self, zeros: Mapping[str, int]) -> bool:
        """Whether a model with these zeros can be the pruned one: each layer has half of the recorded zeros or more."""
        return all(2 * zeros.get(name, 0) >= count for name, count in self.zeros.items())

    def to_checkpoint(self) -> dict[str, Any]:
        """Return plain data and tensors, which `torch.load(weights_only=True)` can read without this package.

        Training resumes without the report, so a report that cannot be read does not prevent it.
        """
        return {**vars(self), "report": None if self.report is None else self.report.to_json()}

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], choices: Mapping[str, Any], name: str) -> PruningState:
        """Restore the state that `to_checkpoint` returned, for a callback of the class `name` with the same choices."""
        if saved.get("choices") != choices:
            raise UserError(
                f"{' and '.join(choices)} must be the same as in the checkpoint, which {name} wrote with "
                f"{saved.get('choices')}, but they are {choices}. Use the same, or load only the weights in a new run."
            )
        known = {each.name: saved[each.name] for each in fields(cls) if each.name in saved}
        try:
            report = PruningReport.from_json(saved["report"]) if known.get("report") else None
        except ValueError as error:
            rank_zero_warn(f"The report that {name} saved in the checkpoint cannot be read, so it has none: {error}")
            report = None
        return cls(**known | {"report": report})
