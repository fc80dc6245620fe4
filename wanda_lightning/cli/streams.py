"""Keep a command running when its output cannot be shown, because of a closed pipe or a terminal without UTF-8."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class TolerantStream:
    """A text stream that replaces characters that it cannot encode, and discards its text once the pipe is closed.

    `is_broken` says whether the pipe is closed (`| head -1`).
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
        """Discard all further output, also what Python flushes at exit."""
        self.is_broken = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def tolerant_streams() -> Iterator[list[TolerantStream]]:
    """Replace stdout and stderr by tolerant streams, and yield these.

    A stream that was closed before Python started (`2>&-`, as under some supervisors) is None. What would be shown is
    discarded, and its file descriptor is taken, or the next file that is opened would get the output of others.
    """
    before = sys.stdout, sys.stderr
    with ExitStack() as opened:
        for number in (0, 1, 2):
            try:
                os.fstat(number)
            except OSError:
                os.dup2(opened.enter_context(open(os.devnull, "r+b")).fileno(), number)
        streams = [TolerantStream(stream or opened.enter_context(open(os.devnull, "w"))) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield streams
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before
