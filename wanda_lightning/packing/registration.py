"""Teach transformers to load packed models, without importing it.

`import wanda_lightning` takes milliseconds, and transformers imports torch, which takes seconds. So the quantizer is
registered at once only if transformers is loaded already, and otherwise as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"  # the module whose import ends the wait
_QUANTIZER = "wanda_lightning.packing.quantizer"


def register() -> None:
    """Register the quantizer in transformers, now or when transformers is imported."""
    if _REGISTRY in sys.modules:
        import_module(_QUANTIZER).register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Find the registry of transformers once, and have it loaded by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Load a module with its own loader, then register the quantizer."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def __getattr__(self, name: str) -> object:
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        import_module(_QUANTIZER).register()
