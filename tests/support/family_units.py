"""Prune hidden units of every family in support/families.py, take them out, and write the table in docs/models.md.

    PYTHONPATH=tests python tests/support/family_units.py --kind causal --only 'qwen*' --resume units.json --write

A family passes if `prune(pattern="structured")` finds hidden units, `shrink` takes out all that are zero, the outputs
stay the same to rounding, and the saved folder loads with transformers or timm and gives these outputs again.
"""

from __future__ import annotations

import copy
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from support import families
from support.families import CannotBuild, Family, first_line, run, table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from wanda_lightning import ImageClassifierModule, prune, shrink
from wanda_lightning.core.patterns import Structured
from wanda_lightning.shrinking import write_modeling_file
from wanda_lightning.shrinking.configuration import auto_classes

HEADING = "## Hidden units that can be taken out"
ORDINARY, OWN_FILE, NO_FOLDER = "ordinary", "with a modeling file", "none"
_PROPERTIES = ("found", "taken out", "loaded")
_MINUTES = 10  # of processor time for a family


@dataclass
class Units:
    """The outcome for a family."""

    kind: str
    name: str
    model: str
    cause: str = ""  # why something is missing
    width: int = 0  # hidden units that were found
    zero: int = 0  # those that pruning set to zero
    removed: int = 0  # those that were taken out
    smaller: float = 0.0  # fraction of all parameters that were taken out
    folder: str = NO_FOLDER
    seconds: float = 0.0

    @property
    def properties(self) -> dict[str, bool]:
        """Whether hidden units were found and taken out, and whether the folder loaded."""
        taken_out = 0 < self.zero == self.removed
        return dict(zip(_PROPERTIES, (self.width > 0, taken_out, self.folder != NO_FOLDER), strict=True))

    def __str__(self) -> str:
        return f"{self.removed} of {self.zero} of {self.width} units  {self.folder}  {self.cause}"


# ---- pruning, taking out, loading


def check(family: Family, result: Units | None = None) -> Units:
    """Prune, shrink, save and load the model of a family; raise an error if its outputs change."""
    result = result or Units(family.kind, family.name, family.model)
    try:
        dense = family.build()
        batches = family.batches(dense)
        for batch in batches:
            run(dense, batch)
    except Exception as error:
        raise CannotBuild(first_line(error)) from error
    model = copy.deepcopy(dense)
    try:
        pattern = Structured(multiple_of=8 if family.kind == "timm" else 1)  # those of transformers are tiny
        report = prune(model, batches, 0.25, pattern=pattern, progress=False)
    except ValueError as error:
        if "finds no hidden units" not in str(error):
            raise
        result.cause = "no hidden units found"
        return result
    notes = [re.search(r"([\d,]+) of ([\d,]+) hidden units are zero", layer.note) for layer in report.layers]
    numbers = [[int(number.replace(",", "")) for number in note.groups()] for note in notes if note]
    result.zero, result.width = (sum(each) for each in zip(*numbers, strict=True))
    zeros, same = copy.deepcopy(model), assert_same
    if family.kind == "timm":  # deep random networks amplify the rounding errors of float32
        same = partial(assert_same, wide=True)
    expected = [outputs(zeros, batch, family.kind == "timm") for batch in batches]
    taken = shrink(model, batches[0])
    result.removed, (before, after) = taken.units, taken.parameters
    result.smaller = 1 - after / before
    same(model, batches, expected)
    if result.removed < result.zero:
        result.cause = f"{result.zero - result.removed} units stay"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / re.sub(r"\W", "_", family.name)
        try:
            save = _timm_folder if family.kind == "timm" else _transformers_folder
            loaded, result.folder = save(family, zeros if family.kind == "timm" else model, path)
            same(loaded, batches, expected)
        except Exception as error:
            result.folder, result.cause = NO_FOLDER, _why_no_folder(family, dense, error, Path(folder) / "dense")
    return result


def outputs(model: nn.Module, batch: Any, wide: bool = False) -> list[Tensor]:
    """Return the floating-point outputs of a model, computed in float64 if `wide`."""
    model, batch = copy.deepcopy((model, batch)) if wide else (model, copy.deepcopy(batch))
    if wide:
        model, batch = model.double(), tree_map_only(Tensor, families._double, batch)
    torch.manual_seed(0)
    leaves = tree_leaves(run(model, batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def assert_same(
    model: nn.Module, batches: Sequence[Any], expected: Sequence[Sequence[Tensor]], wide: bool = False
) -> None:
    """Raise an error unless the outputs are the expected ones, to rounding."""
    for batch, before in zip(batches, expected, strict=True):
        after = outputs(model, batch, wide)
        assert [x.shape for x in after] == [x.shape for x in before], "outputs have other shapes"
        for x, y in zip(before, after, strict=True):
            difference = torch.linalg.vector_norm(x.double() - y.double()) / torch.linalg.vector_norm(x.double())
            assert not difference > 1e-4, f"outputs differ by {difference:.1e}"  # all zeros: not a number


def _transformers_folder(family: Family, model: Any, folder: Path) -> tuple[nn.Module, str]:
    folder.mkdir()
    write_modeling_file(model, folder)
    model.save_pretrained(folder)
    own_file = bool(list(folder.glob("modeling_*.py")))
    names = auto_classes(type(model), model.config)
    auto = getattr(hf, names[0]) if names else type(model)
    if own_file:
        assert names, f"no AutoModel class loads {type(model).__name__}, and its folder has a modeling file"
    loaded = auto.from_pretrained(folder, trust_remote_code=own_file, dtype=torch.float32)
    for module in loaded.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return loaded.eval(), OWN_FILE if own_file else ORDINARY


def _timm_folder(family: Family, model: nn.Module, folder: Path, shrink: bool = True) -> tuple[nn.Module, str]:
    module = ImageClassifierModule(family.model, False, num_classes=16, model_kwargs=family.arguments())
    module.model.load_state_dict(model.state_dict())
    module.eval().save_pretrained(folder, shrink=shrink)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), ORDINARY


def _why_no_folder(family: Family, dense: nn.Module, error: Exception, folder: Path) -> str:
    if "no arguments of" in str(error):
        return "no argument of timm gives the widths"
    try:
        if family.kind == "timm":
            loaded, _ = _timm_folder(family, dense, folder, shrink=False)
        else:
            loaded, _ = _transformers_folder(family, copy.deepcopy(dense), folder)
        batches = family.batches(dense)
        assert_same(loaded, batches, [outputs(dense, batch) for batch in batches])
    except Exception as same:
        return f"the dense model cannot be saved and loaded, either: {first_line(same)}"
    return first_line(error)


def examine(family: Family) -> Units:
    """Call `check`, and return errors as results."""
    result = Units(family.kind, family.name, family.model)
    started = time.process_time()
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, 60 * _MINUTES)
    try:
        check(family, result)
    except _OutOfTimeError:
        result.cause = f"not finished in {_MINUTES} minutes of processor time"
    except CannotBuild as error:
        result.cause = f"cannot be built here: {error}"
    except Exception as error:
        result.cause = first_line(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    result.seconds = time.process_time() - started
    return result


class _OutOfTimeError(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _OutOfTimeError


# ---- the table


def document(results: Sequence[Units]) -> str:
    """Return the part of docs/models.md on hidden units."""
    kinds = {kind: [result for result in results if result.kind == kind] for kind in families.KINDS}
    kinds = {kind: own for kind, own in kinds.items() if own}
    rows = [(families.KINDS.get(kind, kind), *_summary(own)) for kind, own in (kinds | {"all": results}).items()]
    head = ("", "models", "units found", "taken out", "folder loaded", "of these with a modeling file")
    reasons = Counter(re.sub(r"\d+ units", "units", result.cause) for result in results if result.cause)
    lines = [
        HEADING,
        "",
        'For each of these models, a script prunes a quarter of the hidden units with `pattern="structured"`, takes '
        "them out with `shrink`, compares the outputs, saves a folder, loads it with transformers or timm, and "
        "compares again. "
        "Numbers of kept units are multiples of 8 for timm, and any for the tiny models of transformers. Models "
        "without an MLP, or with experts in its place, have no such units. "
        "`PYTHONPATH=tests python tests/support/family_units.py --write` wrote this part.",
        "",
        *table(
            head, *((families.KINDS[kind], *_summary(own)) for kind, own in kinds.items()), ("all", *_summary(results))
        ),
        "",
        share(results),
        "",
        *table(("reason", "models"), *reasons.most_common()),
    ]
    for kind, own in kinds.items():
        columns = ("family", "class", "found", "taken out", "parameters", "folder", "reason")
        rows = map(_row, sorted(own, key=lambda result: result.name))
        lines += ["", f"### {families.KINDS[kind]}", "", *table(columns, *rows)]
    return "\n".join(lines) + "\n"


def share(results: Sequence[Units]) -> str:
    """Return the summary sentence."""
    counts = _summary(results)[1:4]
    shown = ", ".join(f"{name} for {n} ({n / len(results):.1%})" for name, n in zip(_PROPERTIES, counts, strict=True))
    return f"Of {len(results)} models, hidden units are {shown}."


def _summary(results: Sequence[Units]) -> list[int]:
    each = [sum(result.properties[name] for result in results) for name in _PROPERTIES]
    return [len(results), *each, sum(result.folder == OWN_FILE for result in results)]


def _row(result: Units) -> list[object]:
    smaller = f"-{result.smaller:.0%}" if result.removed else ""
    taken_out = f"{result.removed} of {result.zero}"
    return [result.name, result.model, result.width, taken_out, smaller, result.folder, result.cause]


if __name__ == "__main__":
    families.main(examine, Units, document, share)
