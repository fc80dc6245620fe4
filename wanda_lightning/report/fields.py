"""Write dataclasses as JSON, and read them back with a check of each field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from wanda_lightning.common.errors import UserError

_types_of: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def as_json(value: Any) -> str:
    """Return plain data as JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(value), indent=1, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_fields(kind: Any, value: Any, place: str = "") -> Any:
    """Construct an object of an annotated type from its parsed JSON; ignore keys that are not fields.

    Reports of version 0.2.0 may hold NaN and infinity. A null for a number that is not optional was one of these. A
    field that is missing or has another type is refused by its `place`, such as layers[3].sparsity.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:  # with None
        return None if value is None else from_fields(arguments[0], value, place)
    if is_dataclass(kind):
        return _object(kind, value, place)
    if origin in (list, tuple):
        if not isinstance(value, list) or (origin is tuple and ... not in arguments and len(value) != len(arguments)):
            raise _wrong(
                place, "a list" if origin is list or ... in arguments else f"a list of {len(arguments)}", value
            )
        return origin(from_fields(arguments[0], each, f"{place}[{index}]") for index, each in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(place, "an object", value)
        return {name: from_fields(arguments[1], each, f"{place}.{name}") for name, each in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        if value not in (names := [each.value for each in kind]):
            raise _wrong(place, f"one of {', '.join(names)}", value)
        return kind(value)
    if kind is float and value is None:
        return math.nan
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in _NAMES and not (is_number if kind is float else type(value) is kind):
        raise _wrong(place, _NAMES[kind], value)
    return value


def _object(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(place or kind.__name__, "an object", value)
    path = f"{place}." if place else ""
    values = {}
    for each in fields(kind):
        if each.name in value:
            values[each.name] = from_fields(_types_of(kind)[each.name], value[each.name], path + each.name)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise UserError(f"{path}{each.name} is missing.")
    return kind(**values)


def _wrong(place: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    return UserError(f"{place} must be {expected}, but it is {shown if len(shown) < 80 else shown[:77] + '...'}.")
