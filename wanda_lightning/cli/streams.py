"""Keep a command running when its output cannot be shown: a closed pipe, a terminal that is not UTF-8."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TolerantStream:
    """A text stream that drops what nobody reads any more and replaces characters that it cannot encode.

    Attributes:
        is_broken: Whether the reader is gone (`| head -1`).
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.is_broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; return its length."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._give_up()
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        """Send everything else nowhere, also what Python flushes at exit."""
        self.is_broken = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def tolerant_streams() -> Iterator[list[TolerantStream]]:
    """Replace stdout and stderr by tolerant streams while the body runs, and yield them."""
    before = sys.stdout, sys.stderr
    streams = [TolerantStream(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
