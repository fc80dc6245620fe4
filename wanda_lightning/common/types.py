"""Short names of types that signatures repeat."""

from __future__ import annotations

import os
from typing import Any

Kwargs = dict[str, Any]
StrPath = str | os.PathLike[str]
