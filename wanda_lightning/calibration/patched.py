"""Replace an attribute of one module instance temporarily.

`nn.Module` offers no hook that can delay, replace or skip a module's forward, so the engine replaces `forward` in the
instance's own `__dict__`. This bypasses `nn.Module.__setattr__`, which would register a module or parameter, and leaves
the class and all other instances alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def patched(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the instance; restore or remove it at the end."""
    own = module.__dict__
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)
