"""Types that every room uses."""

import os
from collections.abc import Callable
from typing import Any

Kwargs = dict[str, Any]
"""Values by name, such as the arguments of a function."""

Action = Callable[[], None]
"""Does something, such as to undo a change."""

Forward = Callable[..., Any]
"""The `forward` of a module."""

StrPath = str | os.PathLike[str]
"""A path as text or as an object."""
