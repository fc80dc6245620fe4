"""Find the attributes of a model's configuration that hold a number on which the shapes depend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import combinations
from typing import Any

import torch
from torch import nn

_MOST = 3  # attributes that change together

Shapes = Mapping[str, torch.Size]


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes in a model's state dict."""
    return {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}


def pretrained_models(module: nn.Module) -> Iterator[Any]:
    """Yield the models of transformers in a module that lie in no other one."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from pretrained_models(child)


def find_change(model: Any, shapes: Shapes, old: int, new: int, word: str = "") -> Callable[[], None] | None:
    """Return a function that changes a model's configuration, so that a new model has the given shapes.

    The configuration is that of a model of transformers, `model.config`, with the configurations inside it. Few of its
    attributes that are `old` become `new`: the first ones with which the model, built on the meta device, has exactly
    these shapes. Attributes with `word` in their names are tried first.

    Returns:
        None if no attributes give the shapes.
    """
    places = sorted(_places(model.config, old), key=lambda place: word not in place[-1])
    for count in range(1, _MOST + 1):
        for chosen in combinations(places, count):
            trial = deepcopy(model.config)
            _set(trial, chosen, new)
            if _shapes_on_meta(type(model), trial) == shapes:
                return lambda chosen=chosen: _set(model.config, chosen, new)  # type: ignore[misc]
    return None


def _places(config: Any, number: int) -> Iterator[tuple[str, ...]]:
    """Yield the names of all attributes with this value, each after the names of the configurations around it."""
    from transformers import PreTrainedConfig

    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from ((key, *inner) for inner in _places(value, number))
        elif type(value) is int and value == number:
            yield (key,)


def _set(config: Any, places: tuple[tuple[str, ...], ...], number: int) -> None:
    for *outer, key in places:
        inner = config
        for name in outer:
            inner = getattr(inner, name)
        setattr(inner, key, number)


def _shapes_on_meta(model_class: Any, config: Any) -> Shapes:
    """Return the shapes of a new model; none if its class cannot build it."""
    try:
        with torch.device("meta"):
            return shapes_of(model_class(config))
    except Exception:  # whatever the class raises for numbers that do not fit together
        return {}
