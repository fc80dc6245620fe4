"""Search for the settings with which a library builds a model of given shapes.

No table of families says which setting holds a width. Each one that may hold it is changed, and the model is built on
the meta device: a setting is right if more shapes fit. `fit_configuration.py` does so with configurations of
transformers, `timm_arguments.py` with the arguments of timm. What no setting gives is saved as shapes and widths.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch.nn import Module

Setting = tuple[Any, Any]  # a name and a value
Settings = tuple[Setting, ...]  # set one after the other
Sizes = dict[tuple[int, int], None]  # an ordered set of old and new sizes of dimensions

# Attributes of a configuration, and arguments of `shrunk_model`: shapes and widths that no other says.
SHAPES = "shrunk_shapes"
NUMBERS = "shrunk_numbers"


class WrongShape(NamedTuple):
    """The shape of a tensor in a model as built, and in the model that should be built."""

    built: tuple[int, ...]
    right: tuple[int, ...]


def fit_settings(
    model: Module,
    built_with: Callable[[Settings], Module],
    options: Callable[[Settings, Sizes], Iterable[Setting]],
    is_right: Callable[[Settings], bool] = lambda settings: True,
) -> tuple[Settings, Mapping[str, WrongShape]]:
    """Change one setting after another, each time the one with which most tensors get the shapes of a model.

    `options` returns settings to try next, given those so far, and the old and new sizes of what they leave wrong.
    `is_right` decides whether settings that give more shapes may be taken. Returned are the settings, and the tensors
    that still have other shapes.
    """
    names = built_with(()).state_dict().keys()

    def wrong_with(settings: Settings) -> Mapping[str, WrongShape]:
        return wrong_shapes(model, built_with(settings), names)

    settings: Settings = ()
    wrong = wrong_with(settings)
    while wrong:
        better = []
        for option in options(settings, changed_sizes(wrong)):
            candidate = (*settings, option)
            try:
                still_wrong = wrong_with(candidate)
            except Exception:  # whatever a family raises for values that contradict each other
                continue
            if not still_wrong and is_right(candidate):
                return candidate, still_wrong
            if 0 < len(still_wrong) < len(wrong):
                better.append((candidate, still_wrong))

        # `is_right` may run the model, so only the best candidates are asked.
        better.sort(key=lambda candidate: len(candidate[1]))
        best = next((candidate for candidate in better if is_right(candidate[0])), None)
        if best is None:
            break
        settings, wrong = best
    return settings, wrong


def wrong_shapes(
    model: Module, built: Module, names: Collection[str] | None = None
) -> dict[str, WrongShape]:
    """Return the tensors with other shapes than in `model`, among some names; by default among those of `built`."""
    built_shapes = _shapes_of(built)
    names = built_shapes.keys() if names is None else names
    return {
        name: WrongShape(built_shapes.get(name, ()), right)
        for name, right in _shapes_of(model).items()
        if name in names and built_shapes.get(name) != right
    }


def _shapes_of(model: Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def changed_sizes(wrong: Mapping[str, WrongShape]) -> Sizes:
    """Return the old and new sizes of dimensions that do not fit."""
    sizes: Sizes = {}
    for built, right in wrong.values():
        if len(built) == len(right):
            pairs = zip(built, right, strict=True)
            sizes |= dict.fromkeys((old, new) for old, new in pairs if old != new)
    return sizes


def differences(model: Module, built: Module) -> dict[str, Any]:
    """Return the shapes of tensors and the widths of modules that a model as built does not have, by their keys."""
    wrong = wrong_shapes(model, built)
    sizes = changed_sizes(wrong)
    built_modules = dict(built.named_modules())
    numbers = {}
    for name, module in model.named_modules():
        before = vars(built_modules.get(name, module))
        widths = {
            key: now
            for key, now in vars(module).items()
            if type(now) is type(before.get(key)) is int and (before[key], now) in sizes
        }
        if widths:
            numbers[name] = widths
    return {SHAPES: {name: list(shape.right) for name, shape in wrong.items()}, NUMBERS: numbers}
