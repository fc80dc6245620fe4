"""Find the arguments of `timm.create_model` that give the shapes of a shrunk model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.shrinking.configuration import fit_settings


def fitting_arguments(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with which timm builds a model with the shapes of this one.

    Each number among the arguments of the model's class, such as `mlp_ratio`, is scaled as the widths were. `arguments`
    are those of `timm.create_model` beside the name. Raises a ValueError that names layers if none give the shapes.
    """

    def options(found: Iterable[tuple[Any, Any]], sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
        """Yield arguments of which one number, or all numbers in a list, are scaled."""
        pairs = sorted(sizes)
        # A width is often int(channels * ratio): half a unit more protects it against rounding.
        ratios = dict.fromkeys((after + more) / before for more in (0, 0.5) for before, after in pairs)
        for name, value in _build(model, {**arguments, **dict(found)})[1].items():
            for ratio in [*ratios, *(1 / ratio for ratio in ratios)]:
                scaled = _scaled(value, ratio)
                if scaled is not None and scaled != value:
                    yield name, scaled

    try:
        _build(model, arguments)
    except Exception:  # timm cannot build it without its shapes, either: nothing is known about it
        return dict(arguments)
    found, wrong = fit_settings(model, lambda more: _build(model, {**arguments, **dict(more)})[0], options)
    if wrong:
        shown = ", ".join(f"{name} {list(new)} instead of {list(old)}" for name, (old, new) in [*wrong.items()][:3])
        raise UserError(
            f"save_pretrained writes a folder that timm.create_model can build, but no arguments of "
            f"{type(model).__name__} give the widths of this model: {shown}{', ...' if len(wrong) > 3 else ''}. "
            "Save it with its zeros, or keep the module in memory and export it (torch.export, ONNX), which takes "
            "any shape."
        )
    return {**arguments, **dict(found)}


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, list | tuple) and value:
        scaled = [_scaled(each, ratio) for each in value]
        return None if None in scaled else scaled
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    number = value * ratio
    return round(number) if isinstance(value, int) and abs(number - round(number)) < 1e-6 else number


def _build(model: Any, arguments: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model on the meta device; return it, and all arguments that its class got, with defaults."""
    import timm
    from timm.models import get_model_args

    settings: dict[str, Any] = {}
    family: Any = type(model)
    original = family.__init__

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        settings.update(bound.arguments)
        original(self, *args, **kwargs)

    try:
        family.__init__ = recording
        with torch.device("meta"):
            built = timm.create_model(model.pretrained_cfg["architecture"], **get_model_args(model, dict(arguments)))
    finally:
        family.__init__ = original
    settings.pop("self", None)
    settings |= settings.pop("kwargs", {})
    return built, settings
