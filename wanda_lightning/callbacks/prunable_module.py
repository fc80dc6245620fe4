"""The members that a module may define for callbacks and data modules, and the model that callbacks prune."""

from collections.abc import Iterable
from typing import Any, Protocol

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from wanda_lightning.common.aliases import StrPath


class PrunableModule(Protocol):
    """Members that a LightningModule may define for callbacks and data modules; all are optional.

    Do not inherit from this class: it has no defaults. `CausalLMModule` and `ImageClassifierModule` are examples.
    """

    tokenizer: Any
    """Tokenizer of a language model: the default of `TextDataModule`, which refuses another one that differs."""

    @property
    def pruning_target(self) -> nn.Module:
        """The network that callbacks prune and distill, with the names of its layers; by default the module."""

    def calibration_step(self, batch: Any) -> object:
        """Run a batch of calibration data, on the device of the module, through all layers that are pruned.

        `PruningCallback` calls it in eval mode, by default the module itself, as `prune` does. The result is ignored.
        """

    def calibration_predictions(self, batch: Any) -> Any:
        """Run such a batch and return the logits, or an output with `logits`.

        `PruningCallback` calls it for choices that read gradients or train on predictions; by default the module
        itself, or `calibration_step` if the module has no `forward`.
        """

    def calibration_dataloader(self) -> Iterable[Any]:
        """Return the data of a `PruningCallback` without a `dataloader`; a datamodule with this method comes first.

        A datamodule with it may also have `describe_calibration(num_samples)`, which returns a text for the report.
        """

    def load_dense_model(self, name: StrPath) -> nn.Module:
        """Return the dense network of this name, for `DistillFromDense(name)`."""

    def check_tokens(self, input_ids: Tensor) -> None:
        """Raise a ValueError for token ids without an embedding; `TextDataModule` calls it with all its windows."""

    def merge(self) -> None:
        """Merge adapters into the weights; `SavePretrained` calls it in every process before it saves."""

    def check_saving(self) -> None:
        """Raise the errors of `save_pretrained`; `SavePretrained` calls it when training starts."""

    def save_pretrained(
        self, folder: StrPath, overwrite: bool = False, shrink: bool = False
    ) -> object:
        """Write the model into a folder; required by `SavePretrained`, which calls it after training.

        `shrink`, which only `SavePretrained(shrink=True)` passes, leaves out hidden units that are zero on both sides.
        The result then says what was left out, and a `UserError` that there is nothing to leave out.
        """


def pruning_target(pl_module: LightningModule) -> nn.Module:
    """Return the model to prune: the module's `pruning_target` if it has one, else the module itself."""
    return getattr(pl_module, "pruning_target", pl_module)
