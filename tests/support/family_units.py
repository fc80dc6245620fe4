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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from support import families
from support.families import CannotBuild, Family, run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from wanda_lightning import ImageClassifierModule, prune, shrink
from wanda_lightning.core.patterns import Structured
from wanda_lightning.models import Layer, find_layers
from wanda_lightning.models.layers import kind_of
from wanda_lightning.shrinking import write_modeling_file
from wanda_lightning.shrinking.modeling import _auto_classes

HEADING = "## Hidden units that can be taken out"
ORDINARY, OWN_FILE, NO_FOLDER = "ordinary", "with a modeling file", "none"
_PROPERTIES = ("found", "taken out", "loaded")
_MINUTES = 10  # of processor time for a family
_UNKNOWN = "unknown"  # whether it has an MLP


@dataclass
class Units:
    """The outcome for a family."""

    kind: str
    name: str
    model: str
    mlp: str = ""  # a layer that reads what others write by an element-wise function; or `experts`; or nothing
    width: int = 0  # hidden units that were found
    zero: int = 0  # those that pruning set to zero
    removed: int = 0  # those that were taken out
    smaller: float = 0.0  # fraction of all parameters that were taken out
    folder: str = NO_FOLDER
    cause: str = ""  # why something is missing
    seconds: float = 0.0

    @property
    def properties(self) -> dict[str, bool]:
        """Whether hidden units were found and taken out, and whether the folder loaded."""
        taken_out = 0 < self.zero == self.removed
        return dict(zip(_PROPERTIES, (self.width > 0, taken_out, self.folder != NO_FOLDER), strict=True))

    def __str__(self) -> str:
        return f"{self.removed} of {self.zero} of {self.width} units  {self.folder}  {self.mlp}  {self.cause}"


# ---- whether a family has an MLP


def mlp_of(model: nn.Module, batch: Any) -> str:
    """Return the name of a layer whose input is an element-wise function of what layers of its block write.

    This is measured, without the code under test. A layer writes an input of another element-wise if a change of one
    number in its output, at one position, changes at most that one number there. Its input is a function of these
    outputs alone if it stays the same while the outputs of all other matrices of the model change. `experts` stands
    for experts in one tensor, if there is no other such layer.
    """
    every = find_layers(model, "block")
    blocks = [unit.layers for unit in every.units if len({layer.module for layer in unit.layers}) > 1]
    for block in blocks or [every.layers]:
        whole = list({layer.module: layer for layer in block if layer.expert is None}.values())
        before = _inputs_of(model, batch, whole, {})
        order, read_from = list(before), cache(partial(_element_wise, model, batch, readers=whole, before=before))
        for reader in filter(lambda layer: layer.module in before, whole):
            widths = (_width(reader, "in_channels"), 2 * _width(reader, "in_channels"))
            earlier = [layer for layer in whole if layer.module in order[: order.index(reader.module)]]
            fitting = [layer for layer in earlier if _width(layer, "out_channels") in widths]
            found = [layer for layer in fitting if reader.module in read_from(layer)]
            if found and _determines(model, batch, found, reader):
                return reader.name if reader.group is None else reader.name.rpartition(".")[0]
    has_experts = any(layer.expert is not None for layer in every.layers)
    return "experts" if has_experts or any("expert" in matrix.name for matrix in every.skipped) else ""


class _ReachedError(Exception):
    """Ends a forward pass."""


def _width(layer: Layer, channels: str) -> int:
    """Return the number of inputs or outputs of the module of a layer, which may be one group of a convolution."""
    if layer.group is not None:
        number: int = getattr(layer.module, channels)
        return number
    return layer.width if channels == "in_channels" else layer.shape[0]


def _inputs_of(
    model: nn.Module, batch: Any, readers: Sequence[Layer], changes: Mapping[nn.Module, Callable[..., Any]]
) -> dict[nn.Module, Tensor]:
    """Return the first input of each layer that runs, while hooks change outputs of modules."""
    found: dict[nn.Module, Tensor] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in found:
            found[module] = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)).clone()
        if len(found) == len(readers):
            raise _ReachedError

    with ExitStack() as hooks:
        for reader in readers:
            hooks.callback(reader.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module, change in changes.items():
            hooks.callback(module.register_forward_hook(change).remove)
        torch.manual_seed(0)
        with suppress(_ReachedError):
            run(model, copy.deepcopy(batch))
    return found


def _element_wise(
    model: nn.Module, batch: Any, writer: Layer, *, readers: Sequence[Layer], before: Mapping[nn.Module, Tensor]
) -> set[nn.Module]:
    """Return the modules in whose inputs a change of one number that a layer writes changes at most one number."""

    def raising(channel: int) -> Callable[..., Tensor]:
        calls: list[None] = []

        def change(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            calls.append(None)
            if len(calls) > 1:
                return output
            place = [size // 2 for size in output.shape]
            place[1 if isinstance(module, nn.Conv1d | nn.Conv2d) else -1] = channel
            output = output.clone()
            output[tuple(place)] += 1 + 4 * output.abs().max()
            return output

        return change

    channels = _width(writer, "out_channels")
    counts: dict[nn.Module, list[int]] = {module: [] for module in before}
    for channel in (0, channels // 2, channels - 1):
        after = _inputs_of(model, batch, readers, {writer.module: raising(channel)})
        for module, x in before.items():
            y = after.get(module)
            counts[module].append(2 if y is None or x.shape != y.shape else int((x != y).sum()))
    # a ReLU, or a gate that it closes, may hide some
    return {module for module, changed in counts.items() if any(changed) and max(changed) <= 1}


def _determines(model: nn.Module, batch: Any, writers: Sequence[Layer], reader: Layer) -> bool:
    held: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        held.setdefault(module, output.clone())

    def disturb(module: nn.Module, _: Any, output: Any) -> Any:
        if module in held:
            return held[module].clone()
        is_number = isinstance(output, Tensor) and output.is_floating_point()
        return output * (1 + 0.1 * torch.randn_like(output)) if is_number else output

    before = _inputs_of(model, batch, [reader], {layer.module: record for layer in writers})
    matrices = [m for m in model.modules() if kind_of(m) or isinstance(m, nn.Embedding)]
    try:
        after = _inputs_of(model, batch, [reader], dict.fromkeys(matrices, disturb))
    except Exception:  # a choice that the model makes has changed, and shapes with it
        return False
    return torch.equal(before[reader.module], after[reader.module])


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
        raise CannotBuild(families._first_line(error)) from error
    result.mlp = mlp_of(copy.deepcopy(dense), batches[0])
    model = copy.deepcopy(dense)
    try:
        pattern = Structured(multiple_of=8 if family.kind == "timm" else 1)  # those of transformers are tiny
        report = prune(model, batches, 0.25, pattern=pattern, progress=False)
    except ValueError as error:
        if "finds no hidden units" not in str(error):
            raise
        result.cause = _why_none(model, batches[0], result.mlp)
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


def _why_none(model: nn.Module, batch: Any, mlp: str) -> str:
    if not mlp:
        return "no MLP"
    if mlp == "experts":
        return "no MLP outside of experts"
    if getattr(model.get_submodule(mlp), "groups", 1) > 1:
        return "its layers are grouped convolutions, which stay dense"
    calls: list[None] = []
    model.get_submodule(mlp).register_forward_hook(lambda *_: calls.append(None))
    run(model, copy.deepcopy(batch))
    return "a block that runs more than once stays dense" if len(calls) > 1 else "no hidden units found"


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
    names = _auto_classes(type(model), model.config)
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
        return f"the dense model cannot be saved and loaded, either: {families._first_line(same)}"
    return families._first_line(error)


def examine(family: Family) -> Units:
    """Call `check`, and return errors as results."""
    result = Units(family.kind, family.name, family.model)
    started = time.process_time()
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, 60 * _MINUTES)
    try:
        check(family, result)
    except _OutOfTimeError:
        result.mlp = result.mlp or _UNKNOWN
        result.cause = f"not finished in {_MINUTES} minutes of processor time"
    except CannotBuild as error:
        result.cause = f"cannot be built here: {error}"
    except Exception as error:
        result.cause = families._first_line(error)
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
    lines = [
        HEADING,
        "",
        'For each of these models, a script prunes a quarter of the hidden units with `pattern="structured"`, takes '
        "them out with `shrink`, compares the outputs, saves a folder, loads it with transformers or timm, and "
        "compares again. "
        "Numbers of kept units are multiples of 8 for timm, and any for the tiny models of transformers. "
        "`PYTHONPATH=tests python tests/support/family_units.py --write` wrote this part.",
        "",
        "A model has an MLP if the input of one of its layers is an element-wise function of what other layers of the "
        "same block write. This is measured: a change of one number that these write changes at most one number of the "
        "input, and the input stays the same while the outputs of all other matrices change. Experts in one tensor are "
        'MLPs, too, but `pattern="structured"` leaves them dense.',
        "",
        "| | models | with an MLP | units found | taken out | folder loaded | of these with a modeling file |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = [kind for kind in families.KINDS if any(result.kind == kind for result in results)]
    lines += [_summary(families.KINDS[kind], [r for r in results if r.kind == kind]) for kind in kinds]
    lines += [_summary("all", results), "", *shares(results)]
    every = sum(len(families.names(kind)) for kind in families.KINDS)
    if len(results) < every:
        lines += [f"The run was stopped before its end: {every - len(results)} of {every} models are missing."]
    lines += ["", "| reason | models |", "| --- | --- |"]
    reasons = Counter(re.sub(r"\d+ units", "units", result.cause) for result in results if result.cause)
    lines += [f"| {families._cell(reason)} | {number} |" for reason, number in reasons.most_common()]
    for kind in kinds:
        lines += ["", f"### {families.KINDS[kind]}", ""]
        lines += ["| family | class | MLP | found | taken out | parameters | folder | reason |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_row(r) for r in sorted(results, key=lambda result: result.name) if r.kind == kind]
    return "\n".join(lines) + "\n"


def shares(results: Sequence[Units]) -> Iterator[str]:
    """Yield the summary sentence for the models with an MLP, and for those without experts only."""
    for chosen, which in ((_with_mlp, "with an MLP"), (_outside_experts, "with an MLP outside of experts")):
        own = [result for result in results if chosen(result)]
        counts = Counter(name for result in own for name, holds in result.properties.items() if holds)
        shown = ", ".join(f"{name} for {counts[name]} ({counts[name] / max(1, len(own)):.1%})" for name in _PROPERTIES)
        yield f"Of {len(own)} models {which}, hidden units are {shown}."


def _with_mlp(result: Units) -> bool:
    return result.mlp not in ("", _UNKNOWN) or result.width > 0


def _outside_experts(result: Units) -> bool:
    return result.width > 0 or result.mlp not in ("", "experts", _UNKNOWN)


def _summary(title: str, results: Sequence[Units]) -> str:
    counts = Counter(name for result in results for name, holds in result.properties.items() if holds)
    numbers = [len(results), sum(map(_with_mlp, results)), *(counts[name] for name in _PROPERTIES)]
    return f"| {title} | {' | '.join(map(str, [*numbers, sum(r.folder == OWN_FILE for r in results)]))} |"


def _row(result: Units) -> str:
    mlp = {"": "no", "experts": "experts", _UNKNOWN: _UNKNOWN}.get(result.mlp, "yes")
    smaller = f"-{result.smaller:.0%}" if result.removed else ""
    shown = (mlp, result.width, f"{result.removed} of {result.zero}", smaller, result.folder)
    return f"| {result.name} | {result.model} | {' | '.join(map(str, shown))} | {families._cell(result.cause)} |"


def share(results: Sequence[Units]) -> str:
    """Return the summary sentences."""
    return "\n".join(shares(results))


if __name__ == "__main__":
    families.main(examine, Units, document, share, __doc__)
