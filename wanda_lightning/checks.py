"""Checks of option values that need no library."""

from __future__ import annotations

from numbers import Integral


def check_positive(**values: object) -> None:
    """Refuse every value that is not a whole number of at least 1; None stands for an option that was not given.

    Raises:
        ValueError: Names the option and its value.
    """
    for name, value in values.items():
        if value is not None:
            check_at_least(1, **{name: value})


def check_at_least(minimum: int, **values: object) -> None:
    """Refuse every value that is not a whole number of at least `minimum`.

    Raises:
        ValueError: Names the option and its value.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, but it is {value!r}.")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, but it is {value}.")
