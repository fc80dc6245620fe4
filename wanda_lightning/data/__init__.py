"""Text and images for calibration, training and evaluation, as LightningDataModules."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanda_lightning.data.images import ImageDataModule
    from wanda_lightning.data.own_text import sample_windows
    from wanda_lightning.data.text import TextDataModule

__all__ = ["ImageDataModule", "TextDataModule", "sample_windows"]
_FILES = {"ImageDataModule": "images", "TextDataModule": "text", "sample_windows": "own_text"}


def __getattr__(name: str) -> Any:
    """Import a data module on first use, so that the names of data sets can be checked without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
