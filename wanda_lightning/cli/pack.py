"""`wanda-lightning pack`: store a pruned model in fewer bytes."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from wanda_lightning.cli.options import PackOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.packing import layout
from wanda_lightning.packing.folder import PackedSize, pack, used_files
from wanda_lightning.progress import ProgressBar, as_size


def run(options: PackOptions) -> None:
    """Pack a model, and print its size before and after, and what a general compressor makes of the dense model."""
    size = pack(options.source, options.target, options.overwrite, show_progress=True)
    has_zstd = find_spec("zstandard") is not None
    print_table(_table(size, zstd_size(Path(options.source)) if has_zstd else None))
    patterns = ", ".join(f"{number:,} {pattern}" for pattern, number in layout.patterns(size.codes.values()).items())
    print_line(f"Packed matrices: {patterns or 'none, since no matrix has enough zeros'}. All others stay dense.")
    if not has_zstd:
        print_line("zstd was not measured for comparison: it needs pip install 'wanda_lightning[zstd]'.")
    print_line(f"To load {options.target}, import wanda_lightning first.")


def _table(size: PackedSize, zstd: int | None) -> Table:
    table = Table()
    for heading in ("", "dense", "packed", "packed / dense", *(["zstd", "zstd / dense"] if zstd is not None else [])):
        table.add_column(heading, justify="right" if heading else "left")
    compressed = [] if zstd is None else [as_size(zstd), f"{zstd / size.dense:.4f}"]
    table.add_row("all weights", *_row(size.dense, size.packed), *compressed)
    if size.codes:
        table.add_row("packed matrices", *_row(size.dense_matrices, size.packed_matrices), *("" for _ in compressed))
    return table


def _row(dense: int, packed: int) -> list[str]:
    return [as_size(dense), as_size(packed), f"{packed / dense:.4f}"]


def zstd_size(folder: Path) -> int:
    """Return the number of bytes to which zstd compresses the weights in a folder, at its default level."""
    from zstandard import ZstdCompressor

    files, total = used_files(folder)[0], 0
    with ProgressBar("Comparing with zstd", len(files)) as bar, open(os.devnull, "wb") as nowhere:
        for file in files:
            bar.show(file.name)
            with file.open("rb") as dense:
                total += ZstdCompressor().copy_stream(dense, nowhere)[1]
            bar.advance()
    return total
