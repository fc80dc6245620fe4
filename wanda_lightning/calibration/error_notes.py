"""Add to an error the stop and the calibration batch in which it happened."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from wanda_lightning.calibration.trees import tensors_within

_START = "This happened in "


@contextmanager
def note_on_error(
    text: Callable[[], str],
    log: Callable[[str], None] = lambda text: None,
    kind: type[BaseException] = BaseException,
) -> Iterator[None]:
    """Add a note to an error of this kind in the `with` block, and log it, unless the note is empty."""
    try:
        yield
    except kind as error:
        note = text()
        if note:
            error.add_note(note)
            log(note)
        raise


@contextmanager
def naming_batch(index: int, values: Any, stop: str = "") -> Iterator[None]:
    """Add a note to an error with the stop, the batch and the shapes of its values, unless it has one already."""
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        if not any(note.startswith(_START) for note in notes):
            place = f"{stop}, in " if stop else ""
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_within(values))
            with_shapes = f", with shapes {shapes}" if shapes else ""
            error.add_note(
                f"{_START}{place}calibration batch {index} (counted from 0){with_shapes}."
            )
        raise
