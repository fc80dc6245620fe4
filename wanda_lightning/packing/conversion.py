"""Unpack matrices while transformers converts the tensors of a checkpoint to the parameters of a model.

Transformers renames stored tensors, and has converters that fuse or split them. Each converter is replaced by one whose
patterns also match `NAME.compressed` and which unpacks first, before experts are fused. Converters are not documented;
`tests/packing` pins what is used here. A packed matrix that would take another way than a dense one is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.base import HfQuantizer

from wanda_lightning.packing import layout
from wanda_lightning.packing.tensor_file import TensorFile
from wanda_lightning.packing.tensors import unpacked

_Matrices = Mapping[str, tuple[TensorFile, layout.PackedMatrix]]
_ANY_VALUES = rf"\{layout.VALUES}$"
_CASTS_VALUES = hasattr(HfQuantizer, "get_new_dtype")  # before transformers 5.24, converted tensors keep their dtype


def conversions_with_unpacking(
    conversions: Sequence[Any], model: Any, files: Sequence[TensorFile], matrices: _Matrices
) -> list[Any]:
    """Return conversions that load packed matrices like dense ones.

    Args:
        conversions: The conversions of the model.
        model: The model.
        files: The packed files.
        matrices: The file of each packed matrix, by the name of its values.

    Raises:
        ValueError: If a packed matrix would not be loaded like a dense one.
    """
    expected = model.state_dict()
    unpack = _Unpack(matrices, expected)
    new = [_taking_values(each, unpack) if isinstance(each, WeightConverter) else each for each in conversions]
    new.append(WeightConverter(_ANY_VALUES, "", [unpack]))
    stored = {key for file in files for key in file.entries if not key.endswith(layout.COMPANIONS)}
    for key in sorted(stored, key=dot_natural_key):  # the order in which a converter gets tensors
        target, pattern = _renamed(key, new, model, expected)
        if pattern is not None:
            unpack.sources[target, pattern].append(key)
        dense = key.removesuffix(layout.VALUES)
        if dense != key and target != _renamed(dense, conversions, model, expected)[0]:
            raise ValueError(
                f"{dense} is packed, but transformers cannot load it from there, since it converts the weights of a "
                f"{type(model).__name__}. Unpack the folder first: wanda-lightning unpack IN OUT."
            )
    return new


class _Unpack(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """Replace the values of packed matrices by the matrices.

    Attributes:
        sources: The stored names of the tensors that a pattern collects for a parameter, in order.
    """

    supports_many_to_many = True

    def __init__(self, matrices: _Matrices, expected: Mapping[str, Tensor]) -> None:
        self._matrices, self._expected = matrices, expected
        self.sources: dict[tuple[str, str], list[str]] = defaultdict(list)

    def __deepcopy__(self, memo: object) -> _Unpack:  # transformers copies converters for each parameter
        return self

    def convert(self, input_dict: Mapping[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, list[Tensor]]:
        """Unpack the tensors of each pattern."""
        converted = {}
        for pattern, found in input_dict.items():
            tensors = found if isinstance(found, list) else [found]
            keys = self.sources[full_layer_name, pattern]
            matrices = [self._unpacked(key, tensor) for key, tensor in zip(keys, tensors, strict=True)]
            if not _CASTS_VALUES:
                matrices = [matrix.to(self._expected[full_layer_name].dtype) for matrix in matrices]
            converted[full_layer_name if pattern == _ANY_VALUES else pattern] = matrices
        return converted

    def _unpacked(self, key: str, tensor: Tensor) -> Tensor:
        if key not in self._matrices:
            return tensor
        file, matrix = self._matrices[key]
        return unpacked(tensor, layout.positions_of(file, matrix), matrix.shape, matrix.code)


def _taking_values(converter: Any, unpack: _Unpack) -> Any:
    """Return a converter that also takes packed matrices."""
    new = WeightConverter(
        [_with_values(source) for source in converter._original_source_patterns],
        list(converter._original_target_patterns),
        [unpack, *converter.operations],
        force_cpu=converter.force_cpu,
    )
    new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return new


def _with_values(source: str) -> str:
    r"""Return a pattern that matches the name of a tensor and that of its values.

    Example:
        >>> print(_with_values("experts.*.w1.weight"), _with_values("weight$"))
        experts.*.w1.weight(?:\.compressed)?(?!\w) weight(?:\.compressed)?$
    """
    end = "$" if source.endswith("$") else r"(?!\w)" if source[-1:].isalnum() else ""
    return rf"{source.removesuffix('$')}(?:\{layout.VALUES})?{end}"


def _renamed(key: str, conversions: Sequence[Any], model: Any, expected: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the parameter to which transformers assigns a stored tensor, and the pattern of its converter."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
    if name not in expected and key in expected:
        name, pattern = rename_source_key(key, [], [], prefix, expected)
    return name, pattern
