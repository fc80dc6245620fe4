"""`wanda-lightning unpack`: restore a model that was packed."""

from __future__ import annotations

from wanda_lightning.cli.options import PackOptions
from wanda_lightning.packing.folder import unpack


def run(options: PackOptions) -> None:
    """Unpack a model."""
    unpack(options.source, options.target, options.overwrite, show_progress=True)
