"""End a command on Ctrl-C, SIGTERM and SIGHUP, within a step of what it does."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

_ALL = ("SIGINT", "SIGTERM", "SIGHUP")
_SECONDS_BETWEEN = 1.0  # timeout(1) sends its signal twice at once; the second would cut the cleaning up short


class Signals:
    """Raise KeyboardInterrupt in the main thread for each signal, and remember which one came.

    Lightning's Trainer swallows SIGTERM unless a handler is installed already: then it calls that one, too.

    Args:
        names: The signals to handle; one that is ignored already stays ignored (nohup).

    Attributes:
        received: The last signal that came, or None.
    """

    def __init__(self, names: Sequence[str] = _ALL) -> None:
        self.received: signal.Signals | None = None
        self._names, self._when = names, -_SECONDS_BETWEEN
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in self._names if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if time.monotonic() - self._when >= _SECONDS_BETWEEN:
            self._when = time.monotonic()
            raise KeyboardInterrupt
