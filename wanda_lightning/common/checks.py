"""Checks of option values and installed packages, which import no library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from math import inf
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

from wanda_lightning.common.errors import MissingPackageError, UserError


def check_positive(**values: object) -> None:
    """Raise a ValueError for a value that is not a whole number of at least 1; None stands for an unset option."""
    for name, value in values.items():
        if value is not None:
            check_at_least(1, **{name: value})


def check_at_least(minimum: int, **values: object) -> None:
    """Raise a ValueError for a value that is not a whole number of at least `minimum`."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name} must be a whole number, but it is {value!r}.")
        if value < minimum:
            raise UserError(f"{name} must be at least {minimum}, but it is {value}.")


def check_not_negative(**values: object) -> None:
    """Raise a ValueError for a value that is not a finite number of at least 0."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < inf:
            raise UserError(f"{name} must be a number of at least 0, but it is {value!r}.")


def check_seed(seed: object) -> None:
    """Raise a ValueError for a seed that is not a whole number."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise UserError(f"seed must be a whole number, but it is {seed!r}.")


def check_flags(**values: object) -> None:
    """Raise a ValueError for a value that is neither True nor False, such as the text "false", which is true."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} must be True or False, but it is {value!r}.")


def check_callable(**values: object) -> None:
    """Raise a ValueError for a value that cannot be called; None stands for an unset option."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise UserError(f"{name} must be a function, but it is {value!r}.")


def check_batches(**values: object) -> None:
    """Raise a ValueError for anything but a list, a dataloader or another collection of batches."""
    for name, value in values.items():
        if not isinstance(value, Iterable) or isinstance(value, Mapping | str | bytes) or hasattr(value, "dtype"):
            raise UserError(f"{name} must be a list of batches or a dataloader, but it is a {type(value).__name__}.")


def check_path(**values: object) -> None:
    """Raise a ValueError for a value that cannot be the path of a file or folder."""
    for name, value in values.items():
        if not isinstance(value, str | PathLike) or not str(value) or "\0" in str(value):
            raise UserError(f"{name} must be the path of a file or folder, but it is {value!r}.")


def refuse_pytorch_lightning(trainer: object) -> None:
    """Raise a ValueError for a Trainer of `pytorch_lightning`, a copy of Lightning whose objects cannot be mixed."""
    if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in type(trainer).__mro__):
        raise UserError(
            f"trainer must be a lightning.pytorch.Trainer, but it is a {type(trainer).__name__} of pytorch_lightning. "
            "Import Trainer, LightningModule and everything else from lightning.pytorch: pytorch_lightning is a copy "
            "of the same library, and objects of the two cannot be mixed."
        )


def check_memory(option: str, count: int, seqlen: int) -> None:
    """Raise a ValueError if `count` windows of `seqlen` tokens (8 bytes each) do not fit in the free memory."""
    size, free = 8 * seqlen, available_memory()
    if count * size > free:
        raise UserError(
            f"{option} must fit in memory, but {count} windows of {seqlen} tokens need {count * size / 2**30:,.1f} GiB "
            f"and {free / 2**30:,.1f} GiB are free. Use at most {free // size}."
        )


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory() -> int:
    """Return the bytes that this process can still use: those of the machine, or of a container that has fewer."""
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """Yield how much is left of each memory limit of Linux (control groups of version 2 or 1) for this process."""
    lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            folder, limit, usage, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = folder / path.lstrip("/")  # inside a container, it may be the folder itself
        for each in (own, *(parent for parent in own.parents if parent.is_relative_to(folder))):
            with suppress(OSError, ValueError, KeyError):  # no such group, no limit ("max"), other files
                statistics = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
                used = int((each / usage).read_text()) - int(statistics[cache])  # the kernel frees its cache
                yield max(0, int((each / limit).read_text()) - used)


def require_extra(extra: str, *packages: str, purpose: str) -> None:
    """Raise an ImportError that names the extra if one of its packages is missing; `purpose` is a plural subject."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise MissingPackageError(f"{purpose} need {' and '.join(missing)}: pip install 'wanda_lightning[{extra}]'")


def check_report_path(path: str | PathLike[str]) -> str:
    """Return how the path of a report ends; raise an error for another ending, or if no report can be written here."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".png"):
        raise UserError(f"report must end with .html or .png, but it is {str(path)!r}.")
    require_report_extra()
    return suffix


def require_report_extra() -> None:
    """Raise an ImportError if a library that writes reports is missing."""
    require_extra("report", "jinja2", "matplotlib", purpose="Reports with figures")
