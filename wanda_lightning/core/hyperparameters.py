"""Checks of the values that a method is constructed with."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real

from wanda_lightning.common.errors import UserError


@dataclass(frozen=True)
class Number:
    """A finite number in a range: `above` and `below` exclude the bound, `minimum` and `maximum` include it."""

    above: int | float = -inf
    minimum: int | float = -inf
    below: int | float = inf
    maximum: int | float = inf
    whole: bool = False

    def accepts(self, value: object) -> bool:
        """Whether a value is a number in the range."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        return self.above < float(value) < self.below and self.minimum <= float(value) <= self.maximum

    def __str__(self) -> str:
        bounds = {"above": self.above, "of at least": self.minimum, "below": self.below, "at most": self.maximum}
        range_ = " and ".join(f"{text} {bound:.10g}" for text, bound in bounds.items() if isfinite(bound))
        return f"a {'whole ' if self.whole else ''}number {range_}"


@dataclass(frozen=True)
class OneOf:
    """One of several names."""

    names: tuple[str, ...]

    def accepts(self, value: object) -> bool:
        """Whether a value is one of the names."""
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


def check(method: object, **rules: Number | OneOf) -> None:
    """Check attributes of a method, each against its rule; raise a ValueError with the rule and the value."""
    for name, rule in rules.items():
        value = getattr(method, name)
        if not rule.accepts(value):
            raise UserError(f"{name} of {type(method).__name__} must be {rule}, but it is {shown(value)}.")


def shown(value: object) -> str:
    """Return a wrong value for a message: a number or a text as it is written, anything else by its class.

    Example:
        >>> shown("0.5"), shown(None), shown([0.5])
        ("'0.5'", 'None', 'a list')
    """
    return repr(value) if value is None or isinstance(value, str | Real) else f"a {type(value).__name__}"
