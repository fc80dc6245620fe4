"""Save packed models, and load those that transformers does not load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wanda_lightning.files import whole_folder
from wanda_lightning.hub.card import write_card
from wanda_lightning.models.quantized import quantizer
from wanda_lightning.packing import layout
from wanda_lightning.packing.folder import PackedSize, pack_in_place, packed_files
from wanda_lightning.packing.tensors import unpacked
from wanda_lightning.report import PruningReport

_WEIGHTS = "model.safetensors"


def save_packed(
    model: nn.Module, folder: str | os.PathLike[str], overwrite: bool = False, report: PruningReport | None = None
) -> PackedSize:
    """Save a model as a packed folder. Call it in one process only.

    The dense model is written first, then packed, and deleted at the end, so the disk must hold both for a moment.

    Args:
        model: A transformers or timm model, or any module.
        folder: Path to write. After `import wanda_lightning`, `from_pretrained(folder)` loads a transformers model;
            `load_packed` loads any other.
        overwrite: Replace a model that is already in the folder.
        report: What `prune` returned, to write a model card (`README.md`).

    Returns:
        The sizes before and after.

    Raises:
        OSError: If the folder cannot be written, or is not empty without `overwrite`.
        ValueError: If the model has adapters, is quantized, or has a tensor with the name of a part of a packed matrix.
    """
    refuse_to_pack_model(model)
    with whole_folder(folder, overwrite) as new:
        _save_dense(model, new)
        size = pack_in_place(new)
        if report is not None:
            write_card(new, report, name=folder, packed=True)
        return size


def refuse_to_pack_model(model: nn.Module) -> None:
    """Raise a ValueError for a model with adapters or quantized weights, or with names that packing needs."""
    kind = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model must have no adapters to be packed, but {kind} has some. Merge them first: "
            "model = wanda_lightning.lora.merge(model)."
        )
    in_config = getattr(getattr(model, "config", None), "quantization_config", None)
    if in_config or any(_has_quantized_weights(module) for module in model.modules()):
        raise ValueError(
            f"model must be dense to be packed, but {kind} is quantized. Load it in float32, bfloat16 or float16."
        )
    layout.refuse_reserved_names(model.state_dict(), kind)


def _has_quantized_weights(module: nn.Module) -> bool:
    parameters = module.parameters(recurse=False)
    return any(quantizer(module, parameter) is not None for parameter in (None, *parameters))


def _save_dense(model: Any, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, folder / _WEIGHTS)


def load_packed(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a packed model that transformers does not load.

    Args:
        folder: A folder that `save_packed` or `pack` has written, or one of compressed-tensors
            ("sparse-bitmask" or "sparse-24-bitmask").
        model: The module to load the weights into; by default, timm creates the model that the folder describes.

    Returns:
        The model, with all weights loaded.

    Raises:
        OSError: If the folder does not exist or has no weights.
        ValueError: If it is not packed or damaged, or does not fit the model, which may then hold some of its weights.
    """
    path = Path(folder).expanduser()
    config = layout.read_config(path)
    if not layout.is_packed(config) and not layout.is_old_bitmask(config):
        raise ValueError(f"{folder} must be packed, but its config.json does not say so. Load it as a dense model.")
    if model is None:
        if "architecture" not in config:
            raise ValueError(
                f"model must be given for {folder}, which is not a timm model. For a transformers model, use its "
                "from_pretrained instead."
            )
        import timm

        model = timm.create_model(f"local-dir:{path}", pretrained=False)
    weights = packed_state_dict(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
    return model


def packed_state_dict(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a packed folder, unpacked, by name."""
    files = packed_files(folder)
    adds_weight = layout.is_old_bitmask(layout.read_config(folder)) and layout.lacks_weight(files)
    weights = {}
    for file in files:
        matrices = layout.check_file(file)
        companions = {f"{name}{end}" for name in matrices for end in layout.ENDS}
        with safe_open(file.path, framework="pt") as stored:
            for name, matrix in matrices.items():
                values, positions = stored.get_tensor(matrix.values).flatten(), layout.positions_of(file, matrix)
                weights[name + ".weight" * adds_weight] = unpacked(values, positions, matrix.shape, matrix.code)
            weights |= {name: stored.get_tensor(name) for name in file.entries if name not in companions}
    return weights
