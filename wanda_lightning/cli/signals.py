"""End a command on Ctrl-C, SIGTERM and SIGHUP, within a step of its work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

_SECONDS_BETWEEN = 1.0  # timeout(1) sends its signal twice at once; the second one would interrupt the cleanup


class Signals:
    """While entered, raise KeyboardInterrupt in the main thread for each signal, and keep the last one in `received`.

    Lightning's Trainer ignores SIGTERM unless a handler is installed already, which it then calls, too. A signal that
    the process ignores stays ignored (nohup).
    """

    def __init__(self, names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> None:
        self.received: signal.Signals | None = None
        self._names, self._raised_at = names, -_SECONDS_BETWEEN
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in self._names if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if time.monotonic() - self._raised_at >= _SECONDS_BETWEEN:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt
