"""Load packed models with `from_pretrained`, as a quantizer of transformers that only unpacks.

The result is an ordinary dense model with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from wanda_lightning.packing import layout
from wanda_lightning.packing.tensor_file import TensorFile


def register() -> None:
    """Register configuration and quantizer in transformers, once."""
    if layout.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(layout.METHOD)(PackedConfig)
        register_quantizer(layout.METHOD)(PackedQuantizer)


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """The `quantization_config` of a packed model.

    Args:
        version: The version of the format.
        weights: The file of weights, or the index of several.
        **described: What else `config.json` says.

    Raises:
        ValueError: If the version is not supported.
    """

    def __init__(self, version: int | None = None, weights: str = "", **described: Any) -> None:
        layout.refuse_version(version, "config.json")
        self.quant_method = layout.METHOD
        self.version = version
        self.weights = weights
        self.dequantize = True  # transformers then removes this configuration from the model


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Unpack the weights of a packed model while transformers loads them."""

    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a dense model: a model is not packed while it is loaded.

        Raises:
            ValueError: If the model is not packed.
        """
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config must be left out, since from_pretrained unpacks a model but does not pack it. Use "
                "wanda_lightning.save_packed(model, folder)."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the file of weights: this is the only hook that gets the configuration before transformers needs it."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def get_new_dtype(self, converter: object, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Convert kept values to the dtype of the model like dense weights (from transformers 5.24 on)."""
        return dtype if param.get_dtype().startswith(("F", "BF")) else None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        """Check all files before a weight is loaded."""
        self._model = model
        self._files = [TensorFile(Path(path)) for path in checkpoint_files or ()]
        self._matrices: dict[str, tuple[TensorFile, layout.PackedMatrix]] = {}
        for file in self._files:
            layout.refuse_foreign(file)
            for matrix in layout.check_file(file).values():
                self._matrices[matrix.values] = file, matrix
        self._ignored = model._keys_to_ignore_on_load_unexpected
        companions = {rf"\{end}$" for end in layout.COMPANIONS}
        model._keys_to_ignore_on_load_unexpected = companions | set(self._ignored or ())
        return model

    def update_weight_conversions(self, weight_conversions: Sequence[Any], model: object = None) -> list[Any]:
        """Let each converter of the model take packed matrices, and add one for those that no converter takes."""
        from wanda_lightning.packing.conversion import conversions_with_unpacking

        self._conversions = list(weight_conversions)
        return conversions_with_unpacking(self._conversions, self._model, self._files, self._matrices)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Leave the model as if it had been loaded from dense files."""
        model._weight_conversions = [entry for entry in self._conversions if entry.was_used()]
        model._keys_to_ignore_on_load_unexpected = self._ignored
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: the loaded model is saved as a dense one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the loaded model is an ordinary one."""
        return True
