"""Find the arguments of `timm.create_model` that give the shapes of a shrunk model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.shrinking.configuration import Shapes, Wrong, shapes_of, wrong_shapes, wrong_sizes


def fitting_arguments(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with which timm builds a model with the shapes of this one.

    Each number among the arguments of the model's class, such as `mlp_ratio`, is scaled as the widths were. No table
    says which: the model is built on the meta device, and the argument with which most shapes fit is taken first.

    Args:
        model: A model that timm has created.
        arguments: What `timm.create_model` got beside the name.

    Raises:
        ValueError: If no arguments give the shapes; the message names layers that differ.
    """
    target, found = shapes_of(model), dict(arguments)
    try:
        built, settings = _build(model, found)
    except Exception:  # timm cannot build it without its shapes, either: nothing is known about it
        return found
    wrong = wrong_shapes(built, target)
    while wrong:
        best, left = None, wrong
        for extra in _options(settings, wrong):
            try:
                built, others = _build(model, {**found, **extra})
            except Exception:  # whatever the class raises for values that contradict each other
                continue
            if len(now := wrong_shapes(built, target)) < len(left):
                best, left = ({**found, **extra}, others), now
            if not left:
                break
        if best is None:
            shown = ", ".join(f"{name} {list(new)} instead of {list(old)}" for name, (old, new) in [*wrong.items()][:3])
            raise UserError(
                f"save_pretrained writes a folder that timm.create_model can build, but no arguments of "
                f"{type(model).__name__} give the widths of this model: {shown}{', ...' if len(wrong) > 3 else ''}. "
                "Save it with its zeros, or keep the module in memory and export it (torch.export, ONNX), which takes "
                "any shape."
            )
        (found, settings), wrong = best, left
    return found


def _options(settings: Mapping[str, Any], wrong: Wrong) -> Iterator[dict[str, Any]]:
    """Yield arguments of which one number, or all numbers in a list, are scaled."""
    pairs = sorted(wrong_sizes(wrong))
    ratios = dict.fromkeys(after / before for before, after in pairs)
    # A width is often int(channels * ratio): half a unit more protects it against rounding.
    ratios |= dict.fromkeys((after + 0.5) / before for before, after in pairs)
    for name, value in settings.items():
        for ratio in [*ratios, *(1 / ratio for ratio in ratios)]:
            scaled = _scaled(value, ratio)
            if scaled is not None and scaled != value:
                yield {name: scaled}


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, list | tuple) and value:
        scaled = [_scaled(each, ratio) for each in value]
        return None if None in scaled else scaled
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    number = value * ratio
    if isinstance(value, float):
        return number
    return round(number) if abs(number - round(number)) < 1e-6 else number


def _build(model: Any, arguments: Mapping[str, Any]) -> tuple[Shapes, dict[str, Any]]:
    """Build a model on the meta device; return its shapes, and all arguments that its class got, with defaults."""
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
    return shapes_of(built), settings
