"""Show the progress of a long task: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from math import inf

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wanda_lightning.common.busy_machine import warn_if_busy

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Progress of one long task on stderr; `total` is the number of steps, None if it is not known (yet)."""

    def __init__(self, title: str, total: int | None, enabled: bool = True) -> None:
        self._title = title
        self._name = ""
        self._console = Console(stderr=True)
        warn_if_busy()
        self._started = time.monotonic()
        self._last_line = self._started

        shows = enabled and total != 0
        is_terminal = self._console.is_terminal
        self._prints = shows and not is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=inf,  # one step may take longer than rich's 30 s
            disable=not (shows and is_terminal),
        )
        self._bar.add_task(title, total=total)
        self._task = self._bar.tasks[0]

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, error_class: object, *_: object) -> None:
        ending = "stopped"
        if error_class is None:
            ending = "done"
            # It may have needed fewer steps than expected.
            self.expect(self._task.completed)
        self._bar.stop()
        if self._prints:
            self._print_line(ending)

    def expect(self, total: float | None) -> None:
        """Set the number of steps."""
        self._bar.update(self._task.id, total=total)

    def show(self, name: str) -> None:
        """Show the name of the next step."""
        self._name = name
        self._bar.update(self._task.id, description=f"{self._title} {name}")
        self._line_if_due()

    def advance(self, steps: float = 1) -> None:
        """Count steps as done."""
        self._bar.advance(self._task.id, steps)
        # Else `show` writes the line, with the name of the next step.
        if not self._name:
            self._line_if_due()

    def step(self, left: int | None) -> None:
        """Count one step as done, after which at most `left` steps remain; None if that is not known."""
        if left is not None:
            total = self._task.completed + 1 + left
            self.expect(min(total, self._task.total or total))
        self.advance()

    def _line_if_due(self) -> None:
        now = time.monotonic()
        if not self._prints or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        time_left = ""
        left = self._task.remaining
        if left and self._task.completed:
            seconds = (now - self._started) * left / self._task.completed
            time_left = f", {seconds:.0f} s left"
        self._print_line(self._name, time_left)

    def _print_line(self, name: str, time_left: str = "") -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        steps = f"{self._task.completed:.0f}"
        if self._task.total is not None:
            steps += f"/{self._task.total:.0f}"
        words = " ".join(filter(None, (self._title, steps, name)))
        line = f"{words} ({seconds:.0f} s{time_left})"
        # Without breaks: in a log, a message is one line.
        self._console.print(line, highlight=False, soft_wrap=True)
