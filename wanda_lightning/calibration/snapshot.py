"""Notice which attributes of objects were set since a moment, and take it back."""

from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

Attributes = dict[str, Any]
"""The `__dict__` of an object, or the buffers of a module."""

ABSENT = object()
"""The value of an attribute that does not exist."""


class Change(NamedTuple):
    """An attribute that was set or deleted."""

    attributes: Attributes  # of the object, which has it
    name: str
    former: Any

    def undo(self) -> None:
        """Give the attribute its former value."""
        set_or_delete(self.attributes, self.name, self.former)


def set_or_delete(attributes: Attributes, name: str, value: Any) -> None:
    """Set an attribute, or delete it if the value is `ABSENT`."""
    if value is ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


class Snapshot:
    """The attributes of some objects at the time of construction, given as their dictionaries."""

    def __init__(self, dictionaries: Iterable[Attributes]) -> None:
        self._pairs = [(attributes, dict(attributes)) for attributes in dictionaries]

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the value of each attribute."""
        for _, values in self._pairs:
            yield from values.items()

    def changes(self) -> Iterator[Change]:
        """Yield what was set since then."""
        for present, values in self._pairs:
            if present.keys() == values.keys() and all(map(is_, present.values(), values.values())):
                continue  # nearly always
            for name in {**values, **present}:
                former = values.get(name, ABSENT)
                if present.get(name, ABSENT) is not former:
                    yield Change(present, name, former)

    def restore(self) -> None:
        """Take back what was set since then."""
        for change in self.changes():
            change.undo()
