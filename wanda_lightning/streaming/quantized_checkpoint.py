"""Quantized checkpoints: the formats that are read, and the bytes of what is kept.

Transformers dequantizes each weight while it loads a block. Experts that stay do not change, so nothing is quantized
again: the stored tensors of a pruned model are copied from the source.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
import transformers
from torch import Tensor

from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.errors import MissingPackageError, UserError
from wanda_lightning.loop.run import KeptEntries

_METHODS = ("fp8", "mxfp4", "compressed-tensors")  # by `quant_method`
_VERSION = (5, 24)  # of transformers: the first that dequantizes all of them while it loads
# How names end: of quantized values, and of their scales.
_VALUES = ("blocks", ".weight_packed", ".weight")
_SCALES = ("scales", ".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def settings_of(config: Any, name: str) -> dict[str, Any] | None:
    """Return how a model is quantized, by its configuration; None if it is not. Refuse formats that are not read."""
    settings = getattr(config, "quantization_config", None)
    nested = getattr(config.get_text_config(), "quantization_config", None)
    if settings is None and nested is not None:
        raise UserError(
            f"The configuration of {name!r} has quantization_config inside of text_config, where transformers does not "
            "look for it. Move it to the top of config.json."
        )
    if settings is None:
        return None
    method = settings.get("quant_method")
    scheme = method
    if method == "compressed-tensors":
        scheme = _unread_scheme(settings)
    elif method in _METHODS:
        scheme = ""
    if scheme:
        raise UserError(
            f"The model {name!r} is quantized as {scheme!r}, but only {', '.join(_METHODS)} are read, and of "
            "compressed-tensors pack-quantized (symmetric integers) and float-quantized (by tensor or channel). Save "
            "it in float32, bfloat16 or float16, and prune that model."
        )
    require_extra("quantized", "accelerate", "compressed_tensors", purpose="Quantized models")
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < _VERSION:
        raise MissingPackageError(
            f"Quantized models need transformers {'.'.join(map(str, _VERSION))} or later, but {version} is installed: "
            "pip install '.[quantized]' in the source folder"
        )
    return dict(settings)


def _unread_scheme(settings: Mapping[str, Any]) -> str:
    """Describe the first scheme of compressed-tensors that transformers 5.24 does not dequantize for experts.

    It has no zero points for experts, and multiplies weights in FP8 by scales that broadcast.
    """
    for group in settings.get("config_groups", {}).values():
        form = group.get("format") or settings.get("format")
        weights = group.get("weights") or {}
        kind = weights.get("type")
        strategy = weights.get("strategy")
        is_symmetric = weights.get("symmetric", True)
        is_int = form == "pack-quantized" and kind == "int" and is_symmetric
        is_float = (
            form == "float-quantized" and kind == "float" and strategy in ("tensor", "channel")
        )
        if not (is_int or is_float):
            symmetric = "" if is_symmetric else ", asymmetric"
            return f"{form}, {weights.get('num_bits')} bits, {strategy}{symmetric}"
    return ""


def stored_size(dtype: str, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor has in a file; `dtype` is a name of safetensors, such as `F8_E4M3`."""
    bits = re.search(r"\d+", dtype)
    return prod(shape) * (int(bits[0]) if bits else 8) // 8


def refuse_changed_weights(settings: Mapping[str, Any] | None, name: str) -> None:
    """Refuse a quantized model, because weights that change would have to be quantized again."""
    if settings:
        raise UserError(
            f"The model {name!r} is quantized, and weights that change would have to be quantized again. Use "
            "shrink_from_disk with experts=, which leaves the kept experts as they are, or save the model in float32, "
            "bfloat16 or float16 first."
        )


def require_scales(name: str, dtypes: Mapping[str, str], parameters: Mapping[str, str]) -> None:
    """Refuse quantized tensors without scales.

    Args:
        name: The model, for the error.
        dtypes: The data types of all stored tensors, by key.
        parameters: The parameter into which each stored tensor is loaded. A tensor that is not loaded has none; its
            scales only need the same name.
    """
    values = _stems(dtypes, _VALUES)
    scales = _stems(dtypes, _SCALES)
    stored_with = {(stem, parameters.get(key)) for key, stem in scales.items()}
    for key, dtype in dtypes.items():
        if key in scales:
            continue
        is_quantized = dtype.startswith(("F8", "F4"))
        if key in values:
            # A plain weight ends the same, but is no integer; other endings stand for packed numbers only.
            is_quantized |= not key.endswith(".weight") or dtype.startswith(("I", "U"))
        if is_quantized and (values.get(key, key), parameters.get(key)) not in stored_with:
            raise UserError(
                f"The model {name!r} stores {key} as {dtype}, but no scales that belong to it. Check the folder and "
                "its index."
            )


def require_weights(name: str, parameters: Mapping[str, str]) -> None:
    """Refuse scales that are loaded without a weight; the arguments are those of `require_scales`."""
    stems = {*_stems(parameters, _VALUES).values()}
    for key, stem in _stems(parameters, _SCALES).items():
        # A parameter may be called scale, too.
        is_parameter = parameters[key].rpartition(".")[2] == key.rpartition(".")[2]
        if stem not in stems and not is_parameter:
            raise UserError(
                f"The model {name!r} stores the scales {key} without their weight. Check the folder and its index."
            )


@dataclass(frozen=True)
class Spread:
    """Repeats the scales of blocks that do not divide a weight: transformers would divide it into equal blocks."""

    block: tuple[int, int]  # rows and columns with one scale
    shape: tuple[int, int]  # of the weight

    def __call__(self, scales: Tensor) -> Tensor:
        """Return one scale for each weight."""
        for dim in (0, 1):
            index = torch.arange(self.shape[dim]) // self.block[dim]
            scales = _select(scales, dim, index)
        return scales


def uneven_scales(
    settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Spread]:
    """Return how to repeat those scales of FP8 whose blocks do not divide their weight, by key.

    An example is `kv_a_proj_with_mqa` of DeepSeek-V3, with 576 rows in 5 blocks of 128. Transformers 5.24 divides the
    rows by the number of blocks: it refuses this weight, and would read one of 192 rows in blocks of 96.
    """
    block = settings.get("weight_block_size")
    spreads = {}
    for key, stem in _stems(shapes, _SCALES).items():
        shape = shapes.get(f"{stem}.weight", ())
        if not block or len(shape) != 2:
            continue
        grid = [ceil(size / step) for size, step in zip(shape, block, strict=True)]
        is_uneven = any(size % step for size, step in zip(shape, block, strict=True))
        if is_uneven and list(shapes[key]) == grid:
            rows, columns = shape
            spreads[key] = Spread(tuple(block), (rows, columns))
    return spreads


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return some entries of a tensor, which may have a data type that PyTorch does not index."""
    octets = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return octets.index_select(dim, index).view(tensor.dtype)


def _stems(keys: Iterable[str], endings: Sequence[str]) -> dict[str, str]:
    """Return the keys with one of these endings, and the keys without it."""
    return {
        key: key.removesuffix(ending) for key in keys for ending in endings if key.endswith(ending)
    }


def kept_tensor(
    key: str, tensor: Tensor, parameter: str, kept: Mapping[str, KeptEntries]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what is left of a stored tensor, with its key: all of it, some entries, or nothing.

    Args:
        key: The stored name; that of an expert's own tensor has the number of the expert.
        tensor: As it is stored.
        parameter: The parameter into which it is loaded.
        kept: What is left of parameters that have lost experts.
    """
    if parameter not in kept:
        yield key, tensor
        return
    entries = kept[parameter]
    numbers = list(_NUMBER.finditer(key))
    is_single = len(numbers) > len(_NUMBER.findall(parameter))
    if not is_single:
        yield key, _select(tensor, entries.dim, torch.tensor(entries.indices))
        return

    expert = numbers[-1]
    if int(expert[0]) in entries.indices:
        number = entries.indices.index(int(expert[0]))
        yield f"{key[: expert.start()]}{number}{key[expert.end() :]}", tensor
