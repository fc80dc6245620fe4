"""Types that every room uses."""

import os
from typing import Any

Kwargs = dict[str, Any]
"""Values by name, such as the arguments of a function."""

StrPath = str | os.PathLike[str]
"""A path as text or as an object."""
