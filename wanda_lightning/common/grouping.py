"""Group items by a key."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Item = TypeVar("_Item")


def grouped(items: Iterable[_Item], key: Callable[[_Item], Any]) -> dict[Any, list[_Item]]:
    """Return the items by key, in the order in which the keys first occur."""
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
