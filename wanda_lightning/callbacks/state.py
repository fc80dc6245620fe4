"""What a checkpoint holds of a pruning callback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wanda_lightning.report import PruningReport


@dataclass
class PruningState:
    """How far a callback has pruned. Which weights are zero is not part of it: the weights themselves say so.

    Attributes:
        choices: The choices that a resumed run must not change.
        zeros: Number of zeros of each pruned layer.
        share: Fraction of the final sparsity that is reached.
        asked_at: Optimizer step at which `should_prune` was called last.
        due: Whether to prune at the end of the next validation loop.
        unheld_zeros: Weights that are zero by chance, see `HeldZeros.unheld_zeros`.
        report: What the latest pruning did.
    """

    choices: dict[str, Any]
    zeros: dict[str, int] = field(default_factory=dict)
    share: float = 0.0
    asked_at: int | None = None
    due: bool = False
    unheld_zeros: dict[str, Tensor] = field(default_factory=dict)
    report: PruningReport | None = None

    def record(self, report: PruningReport, share: float) -> None:
        """Record that the model was pruned to a share of the final sparsity.

        Layers that this pruning did not reach keep their zeros from an earlier stage. A layer that is all zeros was
        initialized so, not pruned, and may train.
        """
        self.zeros |= {layer.name: layer.zeros for layer in report.layers if 0 < layer.sparsity < 1}
        self.report, self.share, self.due = report, share, False

    def describes(self, zeros: Mapping[str, int]) -> bool:
        """Whether a model with these zeros can be the one that was pruned, perhaps trained since then.

        It is not if a layer has lost more than half of its zeros: the model is another, or got dense weights.
        """
        return all(2 * zeros.get(name, 0) >= count for name, count in self.zeros.items())

    def to_checkpoint(self) -> dict[str, Any]:
        """Return plain data and tensors, which `torch.load(weights_only=True)` reads without this package."""
        return {**vars(self), "report": None if self.report is None else self.report.to_json()}

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], choices: Mapping[str, Any], name: str) -> PruningState:
        """Read what `to_checkpoint` wrote.

        Args:
            saved: What `to_checkpoint` returned.
            choices: The choices of the callback that resumes.
            name: Its class, for the message.

        Raises:
            ValueError: If the choices are others.
        """
        if saved["choices"] != choices:
            raise ValueError(
                f"{' and '.join(choices)} must be those of the checkpoint, which {name} wrote with {saved['choices']}, "
                f"but they are {choices}. Use the same, or load only the weights and start a new run."
            )
        report = saved["report"]
        return cls(**{**saved, "report": None if report is None else PruningReport.from_json(report)})
