"""Describe the run of a callback for its report: the names of the model and of the calibration data."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from wanda_lightning.callbacks.prunable_module import pruning_target
from wanda_lightning.report import Circumstances


def describe_run(trainer: Trainer, num_samples: int) -> Circumstances:
    """Describe the model and the calibration samples, if there are any from the datamodule."""
    data = ""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if num_samples and hasattr(datamodule, "describe_calibration"):
        data = datamodule.describe_calibration(num_samples)
    return Circumstances(model=_name_of(trainer.lightning_module), calibration=data)


def _name_of(pl_module: LightningModule) -> str:
    """Return the name from which the model was loaded; empty if it is not known."""
    model = pruning_target(pl_module)
    arguments = pl_module.hparams
    name = arguments.get("model")

    # Models of transformers have this attribute, and those of timm the next one. In the hyperparameters of any other
    # module, `model` could mean anything.
    if hasattr(model, "name_or_path"):
        return name if isinstance(name, str) else str(model.name_or_path)
    if not isinstance(name, str) or not hasattr(model, "pretrained_cfg"):
        return ""

    weights = arguments.get("checkpoint")
    if not weights and not arguments.get("pretrained", True):
        weights = "not pretrained"
    timm_name = f"timm:{name.removeprefix('timm:')}"
    return f"{timm_name} ({weights})" if weights else timm_name
