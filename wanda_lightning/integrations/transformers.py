"""Keep zeros in the Trainer of transformers, and in trainers that derive from it, such as those of TRL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from wanda_lightning.common.errors import UserError
from wanda_lightning.training.held_zeros import HeldZeros


class KeepZerosCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keep every zero of a pruned model at zero while transformers' `Trainer` trains it.

    The zeros are those that each prunable layer has when training starts; see `keep_zeros`. A resumed run continues
    exactly as it would have: the checkpoint's `trainer_state.json` lists weights that have become zero by chance, which
    go on training.

    After an error or Ctrl-C in `train`, which transformers does not report to callbacks, the zeros are held until
    `release()`, or until the callback trains again.

    Example::

        Trainer(pruned, args, train_dataset=data, callbacks=[KeepZerosCallback()]).train()

    Raises:
        ValueError: When training starts, if FSDP or DeepSpeed distributes the weights.
    """

    def __init__(self) -> None:
        self._zeros = HeldZeros()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the zeros and hold them."""
        _refuse_distributed_weights(args)
        assert model is not None, "transformers passes the model to every hook"
        self._zeros.release()
        if state.global_step > 0:  # resumed
            saved = state.stateful_callbacks.get(type(self).__name__)
            # If there are several such callbacks, each save appends their states, which are equal.
            if saved := saved[-1] if isinstance(saved, list) else saved:
                self._zeros.load_state_dict(_from_json(saved["attributes"]["held"]))
            else:  # the Trainer only saves callbacks that the checkpoint knows
                state.stateful_callbacks[type(self).__name__] = self.state()
        self._zeros.hold_all(model)
        self._zeros.clear([] if optimizer is None else [optimizer])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self.release()

    def release(self) -> None:
        """Remove the hooks; the zeros may then change."""
        self._zeros.release()

    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` stores."""
        return {"args": {}, "attributes": {"held": _to_json(self._zeros.state_dict())}}


def _to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with lists in place of its tensors, whose dtypes say how they are packed."""
    unheld: Mapping[str, Tensor] = state["unheld_zeros"]
    found = {
        name: [str(bits.dtype).removeprefix("torch."), bits.tolist()]
        for name, bits in unheld.items()
    }
    return {**state, "unheld_zeros": found}


def _from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    found = state["unheld_zeros"].items()
    unheld = {name: torch.tensor(bits, dtype=getattr(torch, kind)) for name, (kind, bits) in found}
    return {**state, "unheld_zeros": unheld}


def _refuse_distributed_weights(args: TrainingArguments) -> None:
    launched = [
        kind
        for kind in ("FSDP", "DeepSpeed")
        if os.environ.get(f"ACCELERATE_USE_{kind.upper()}") == "true"
    ]
    used = "FSDP" if args.fsdp else "DeepSpeed" if args.deepspeed else "".join(launched)
    if used:
        raise UserError(
            f"KeepZerosCallback needs each process to hold the whole model, but {used} distributes its weights. Train "
            "with DistributedDataParallel (torchrun without fsdp and deepspeed), or use KeepZeros in Lightning, which "
            "supports FSDP2."
        )
