"""Keep zeros in the Trainer of transformers, and in trainers that derive from it, such as those of TRL."""

import os
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from wanda_lightning.common.errors import UserError
from wanda_lightning.training.held_zeros import HeldZeros, State


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
        model: Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the zeros and hold them."""
        _refuse_distributed_weights(args)
        assert model is not None, "transformers passes the model to every hook"
        self._zeros.release()
        if state.global_step > 0:
            self._resume(state)
        self._zeros.hold_all(model)
        if optimizer:
            self._zeros.clear([optimizer])

    def _resume(self, state: TrainerState) -> None:
        """Load the state of an interrupted run."""
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if not saved:
            # The interrupted run had no such callback. The Trainer only saves the states of callbacks in this table.
            state.stateful_callbacks[name] = self.state()
            return
        # If there are several such callbacks, each save appends their states, which are equal.
        if isinstance(saved, list):
            saved = saved[-1]
        self._zeros.load_state_dict(_from_json(saved["attributes"]["held"]))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        self.release()

    def release(self) -> None:
        """Remove the hooks; the zeros may then change."""
        self._zeros.release()

    def state(self) -> State:
        """Return what `trainer_state.json` stores."""
        return {"args": {}, "attributes": {"held": _to_json(self._zeros.state_dict())}}


def _to_json(state: State) -> State:
    """Return a state with lists in place of its tensors, whose dtypes say how they are packed."""
    unheld = {
        name: [str(values.dtype).removeprefix("torch."), values.tolist()]
        for name, values in state["unheld_zeros"].items()
    }
    return {**state, "unheld_zeros": unheld}


def _from_json(state: State) -> State:
    """Return the state from which `_to_json` returned this one."""
    unheld = {
        name: torch.tensor(values, dtype=getattr(torch, dtype))
        for name, (dtype, values) in state["unheld_zeros"].items()
    }
    return {**state, "unheld_zeros": unheld}


def _refuse_distributed_weights(args: TrainingArguments) -> None:
    for name, option in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)):
        # `accelerate launch` chooses by a variable of the environment, not by an argument of the Trainer.
        if option or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            raise UserError(
                f"KeepZerosCallback needs each process to hold the whole model, but {name} distributes its weights. "
                "Train with DistributedDataParallel (torchrun without fsdp and deepspeed), or use KeepZeros in "
                "Lightning, which supports FSDP2."
            )
