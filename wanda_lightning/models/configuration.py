"""Find the configuration that describes a model of transformers after its shapes have changed.

No table of families says which attribute holds a number. Each attribute that has the old one is set to the new one, and
the model is built on the meta device: an attribute is right if more shapes fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

_Shapes = Mapping[str, torch.Size]


def fit_configuration(model: nn.Module) -> tuple[str, Callable[[], None]]:
    """Adapt the configuration of each model of transformers that a model is or contains to the shapes of the model.

    Returns:
        Which configuration cannot describe them, empty if all do; and a function that undoes the changes.
    """
    from transformers import PreTrainedModel

    found = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    inner = {each for outer in found for each in outer.modules() if each is not outer}
    outermost = [each for each in found if each not in inner]
    before = [attribute for each in outermost for attribute in _attributes(each.config)]

    def undo() -> None:
        for attribute in before:
            setattr(*attribute)

    names = [f"{type(each.config).__name__} give {type(each).__name__}" for each in outermost if not _fit(each)]
    return f"no attributes of {names[0]} its new shapes" if names else "", undo


def _fit(model: Any) -> bool:
    """Change the attributes with which more shapes fit; return whether all fit then."""
    built, actual = _built(model), {name: tensor.shape for name, tensor in model.state_dict().items()}
    target = {name: actual[name] for name in built.keys() & actual.keys()}  # not what was added, such as buffers
    pairs = {pair for name in target for pair in zip(built[name], target[name], strict=False)}
    wrong = _wrong(built, target)
    for config, name, value in [*_attributes(model.config)]:
        for old, new in sorted(pairs) if wrong else ():
            if old == value != new:
                setattr(config, name, new)
                fewer = _wrong(_built(model), target)
                wrong, value = (fewer, new) if fewer < wrong else (wrong, value)
                setattr(config, name, value)
    return bool(target) and not wrong


def _attributes(config: Any) -> Iterator[tuple[Any, str, int]]:
    """Yield the whole numbers in a configuration and those inside it: the configuration, the name and the value."""
    from transformers import PreTrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _attributes(value)
        elif type(value) is int:
            yield config, name, value


def _built(model: Any) -> _Shapes:
    """Return the shapes of a new model with the same configuration; none if its class cannot build it."""
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            return {name: x.shape for name, x in type(model)(deepcopy(model.config)).state_dict().items()}
    except Exception:  # whatever the class raises for numbers that contradict each other
        return {}


def _wrong(built: _Shapes, target: _Shapes) -> int:
    return sum(built.get(name) != shape for name, shape in target.items())
