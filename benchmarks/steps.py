"""Measure one step after another within a time limit; a step that fails does not stop the others."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from result import Result, Runs


class Step(NamedTuple):
    """Something to measure.

    Attributes:
        planned: The run, without its numbers.
        measure: Returns the numbers.
        expected: Returns a guess of the seconds, which only decides whether the step starts.
        obstacle: Why the step cannot run here; empty if it can.
    """

    planned: Result
    measure: Callable[[], Mapping[str, float]]
    expected: Callable[[], float]
    obstacle: str = ""


def measure_in_turn(steps: Iterable[Step], runs: Runs, minutes: float) -> int:
    """Measure and save each step that is not saved yet and for which enough time is left.

    Prints what was not measured, with the reasons.

    Returns:
        The exit status: 1 if a step failed, else 0.
    """
    until = time.monotonic() + 60 * minutes
    not_run, failed = [], []
    for step in steps:
        if runs.saved(step.planned):
            continue
        name, left, expected = step.planned.name, until - time.monotonic(), step.expected()
        if step.obstacle or left < expected:
            not_run.append(f"{name}: {step.obstacle or f'about {expected:.0f} s, and {left:.0f} s were left'}")
            continue
        print(f"{left:.0f} s left: {name}", flush=True)
        try:
            runs.save(step.planned, step.measure())
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}")
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    for heading, names in (("Not run", not_run), ("Failed", failed)):
        print("\n".join([f"{heading}: {len(names)}", *(f"  {name}" for name in names)]), flush=True)
    return int(bool(failed))
