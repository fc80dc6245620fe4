"""Prune one small random model of any family in transformers and timm, and check it.

`benchmarks/families.py` does so for all families. A family is a configuration class (transformers) or a module (timm);
`support.zoo` builds its model. `check` prunes it to 50 % and to 2:4, with sequential="block" and "layer" (timm models
also with "none"). The model passes if every matrix inside its blocks has exactly its sparsity or is skipped with a
reason, no skipped weight changed, all outputs are finite, and the masks for "block" equal, in float64, those of a slow
procedure that computes its own statistics (`slow_prune`).
`check_units` prunes hidden units and takes out all that are zero; the outputs must stay the same to
rounding, and the saved folder must load with transformers or timm and give these outputs again.
"""

from __future__ import annotations

import copy
import re
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from support.zoo import CannotBuild, Family, double, matrices, outputs, without_cache
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from wanda_lightning import ImageClassifierModule, PruningReport, Structured, prune, shrink
from wanda_lightning.models import Layer, Stop, find_layers
from wanda_lightning.units.modeling_file import auto_classes, write_modeling_file

aten = torch.ops.aten
SEQUENTIAL = ("block", "layer", "none")
PATTERNS = ("unstructured", "2:4")
ORDINARY = "ordinary"
OWN_FILE = "with a modeling file"
_MINUTES = 10  # of processor time for a family
_outputs = torch.no_grad()(outputs)


@dataclass
class Result:
    """The outcome for a family."""

    kind: str
    name: str
    model: str
    cause: str = ""  # the first line of the error, if it does not pass
    status: str = "fails"  # or `passes`, or `cannot be built here`
    coverage: float = 0.0  # pruned parameters divided by those of all matrices inside the blocks that a batch reaches
    # The fraction of those that stay dense, by reason.
    left_out: dict[str, float] = field(default_factory=dict)
    slow: str = ""  # the dtype in which `block` equals the slow procedure
    width: int = 0  # hidden units that were found
    zero: int = 0  # those that pruning set to zero
    removed: int = 0  # those that were taken out
    smaller: float = 0.0  # fraction of all parameters that were taken out
    folder: str = ""  # how the smaller model is saved, or why it is not


def _finite(output: Any) -> bool:
    leaves = [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    assert leaves, "the model returns no floating-point output"
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def check(
    family: Family, slowly: bool = True, ways: Sequence[tuple[str, str]] | None = None
) -> Result:
    """Prune a model in every way, or in some, and check the result by assertions."""
    result = Result(family.kind, family.name, family.model)
    dense = _build(family)
    assert all(_finite(_outputs(dense, batch)) for batch in family.batches()), (
        "outputs of the dense model"
    )
    for sequential, pattern in ways or product(
        SEQUENTIAL[: 3 if family.kind == "timm" else 2], PATTERNS
    ):
        model = copy.deepcopy(dense)
        choices = {
            "pattern": pattern,
            "sequential": sequential,
            "keep_batch_norm": True,
            "progress": False,
        }
        report = prune(model, family.batches(), 0.5, **choices)
        _verify(model, dense, report, pattern)
        assert all(_finite(_outputs(model, batch)) for batch in family.batches()), (
            f"not finite: {pattern}"
        )
        if (sequential, pattern) == ("block", "unstructured"):
            result.coverage, result.left_out = _coverage(dense, report, family.batches())
    result.slow = _compare(dense, family.batches()) if slowly else ""
    result.status = "passes"
    return result


def _build(family: Family) -> nn.Module:
    """Return the dense model, which has run once."""
    try:
        model = family.build()
        for batch in family.batches():
            _outputs(model, batch)
    except Exception as error:
        raise CannotBuild(first_line(error)) from error
    return model


def _verify(model: nn.Module, dense: nn.Module, report: PruningReport, pattern: str) -> None:
    layers = {layer.name: layer for layer in find_layers(model).layers}
    pruned = {layer.name: layers[layer.name] for layer in report.layers}
    listed = {*pruned, *(matrix.name for matrix in report.skipped)}
    lost = [
        name
        for name in matrices(model, experts=False)
        if not any(f"{other}.".startswith(f"{name}.") for other in listed)
    ]
    assert not lost, f"neither pruned nor skipped: {lost[0]}"
    assert all(matrix.detail for matrix in report.skipped)
    for name, layer in pruned.items():
        zeros = layer.read() == 0
        if pattern == "2:4":
            assert zeros.unflatten(1, (-1, 4)).sum(2).eq(2).all(), f"not 2:4: {name}"
        else:
            assert zeros.sum(1).eq(int(zeros.shape[1] * 0.5)).all(), f"not 0.5 of each row: {name}"
    written = {id(layer.parameter) for layer in pruned.values()}
    before = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        kept = (
            parameter != 0
            if id(parameter) in written
            else torch.ones_like(parameter, dtype=torch.bool)
        )
        assert torch.equal(parameter[kept], before[name][kept]), f"{name} changed"
    for (name, buffer), other in zip(model.named_buffers(), dense.buffers(), strict=True):
        assert torch.equal(buffer, other) or buffer.isnan().any(), f"buffer {name} changed"


_OUTSIDE = ("embedding", "output head", "stem", "tied to")


def _coverage(
    model: nn.Module, report: PruningReport, batches: list[Any]
) -> tuple[float, dict[str, float]]:
    """Return which fraction of the matrices inside the reached blocks is pruned, and why the rest is not."""
    blocks, idle = _reached_blocks(model, batches)
    found = matrices(model, experts=False)
    sized = [("pruned", layer.name, layer.size) for layer in report.layers]
    sized += [(m.detail, m.name, found[m.name].numel()) for m in report.skipped if m.name in found]
    sizes: Counter[str] = Counter(pruned=0)
    for detail, name, size in sized:
        if _inside(name, blocks) and not _inside(name, idle) and not detail.startswith(_OUTSIDE):
            sizes[detail] += size
    total = max(1, sum(sizes.values()))
    return sizes.pop("pruned") / total, {reason: n / total for reason, n in sizes.most_common()}


def _inside(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}." if module else "") for module in modules)


def _reached_blocks(model: nn.Module, batches: list[Any]) -> tuple[set[str], set[str]]:
    """Return the outermost repeated modules, and the modules that no batch enters.

    If the repeated modules hold less than half of the parameters, the whole model counts as one block. A single layer
    never counts as a module that no batch enters, since another module may read its weight.
    """
    modules = dict(model.named_modules())
    called = set()
    with ExitStack() as hooks:
        for name, module in modules.items():
            entering = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            hooks.callback(entering.remove)
        for batch in batches:
            _outputs(model, batch)
    idle = {name for name, module in modules.items() if next(module.children(), None) is not None}
    idle -= {name for name in idle if any(_inside(other, {name}) for other in called)}
    lists = {
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    repeated = {
        f"{name}.{child}".lstrip(".")
        for name in lists
        for child, _ in modules[name].named_children()
    }
    repeated |= {
        name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)
    }
    sizes = {
        name: p.numel()
        for name, p in matrices(model, experts=False).items()
        if "embed" not in name and not _inside(name, idle)
    }
    inside = sum(n for name, n in sizes.items() if _inside(name, repeated))
    return repeated if inside >= sum(sizes.values()) / 2 else {""}, idle


def _compare(dense: nn.Module, batches: list[Any]) -> str:
    """Return the dtype in which the masks for sequential="block" equal those of the slow procedure."""
    model = copy.deepcopy(dense)
    wide = tree_map_only(Tensor, double, batches)
    if hasattr(model, "set_experts_implementation"):
        # Grouped products are not intercepted, and have no float64.
        model.set_experts_implementation("eager")
    narrow = copy.deepcopy(model)
    try:
        model.double()
        for batch in wide:
            _outputs(model, batch)
    except RuntimeError:  # some part of it always computes in float32
        model = narrow
        wide = batches
    batches = wide
    dtype = next(model.parameters()).dtype
    slow = copy.deepcopy(model)
    prune(model, batches, 0.5, sequential="block", progress=False)
    slow_prune(slow, batches)
    expected = dict(slow.named_parameters())
    other = {
        name: int(((p == 0) != (expected[name] == 0)).sum()) for name, p in model.named_parameters()
    }
    if worst := [name for name, count in other.items() if count]:
        counts = f"{sum(other.values())} of {sum(int((p == 0).sum()) for p in model.parameters())}"
        raise AssertionError(
            f"{dtype}: {counts} zeros are not those of the slow procedure, in {worst[0]} first"
        )
    return str(dtype).removeprefix("torch.")


def slow_prune(
    model: nn.Module, batches: list[Any], sequential: str = "block", sparsity: float = 0.5
) -> None:
    """Prune with Wanda, stop by stop, in plain code.

    For each stop, every batch runs through the model as pruned so far, up to the first end of that stop. The inputs of
    a weight are read where PyTorch multiplies, below all modules. Padding is found in the products with as many tokens
    as the `attention_mask` has, so not in those of experts.
    """
    stops = find_layers(model, sequential).stops
    for stop in stops if sequential == "none" else _in_order(model, stops, batches):
        sums = _InputSquares(stop.layers)
        handle = (stop.module or model).register_forward_hook(_stop)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            sums.tokens = None if mask is None else mask.flatten().bool()
            with suppress(_UnitDone), _Products(sums.on_product):
                _outputs(model, batch)
        handle.remove()
        for layer in stop.layers:
            sums.zero_smallest(layer, sparsity)


class _UnitDone(Exception):
    """The stop has run, so the rest of the model need not."""


def _stop(*_: object) -> None:
    raise _UnitDone


class _Products(TorchDispatchMode):
    """Call a function for each product, with the weight, and with the tokens that it multiplies.

    For a convolution, it gets the sum of x² that each weight multiplies, in the shape of the weight: the gradient of
    the summed output with respect to that weight, for the input x².
    """

    def __init__(self, on_product: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._on_product = on_product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            x, weight = args[-2:]
            if weight.ndim == 3 and weight.stride(0) == 0:  # one matrix for all samples
                x = x.flatten(0, 1)
                weight = weight[0]
            self._on_product(weight, x)
        elif func.overloadpacket is aten.convolution:
            x, weight, _, *options = args
            ones = torch.ones_like(output)
            only_weight = (False, True, False)
            _, squares, _ = aten.convolution_backward(
                ones, x.square(), weight, None, *options, only_weight
            )
            self._on_product(weight, squares)
        return output


class _InputSquares:
    """Sum x² over the tokens that are multiplied with each weight, in whichever layout it is stored.

    For an expert that few tokens reach, the tokens of all experts count, as in `prune`.
    """

    def __init__(self, layers: Sequence[Layer], enough: int = 32) -> None:
        self.tokens: Tensor | None = None  # which tokens of the batch are no padding
        self._enough = enough
        self._all = layers
        # Any of the experts of a parameter.
        self._layers = {layer.parameter.data_ptr(): layer for layer in layers}
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: Counter[tuple[int, int]] = Counter()
        self._columns: dict[int, bool] = {}

    def on_product(self, weight: Tensor, x: Tensor) -> None:
        start = weight.untyped_storage().data_ptr()
        if start not in self._layers:
            return
        if _is_convolution(layer := self._layers[start]):
            self._sums[start, 0] = self._sums.get((start, 0), 0) + x
            return
        one = layer.own(layer.parameter)
        self._columns[start] = (weight.shape[-2], weight.stride(-2)) == (
            one.shape[0],
            one.stride(0),
        )
        first = weight.storage_offset() // one.numel()
        for place, tokens in enumerate(x if weight.ndim == 3 else [x]):
            kept = tokens.any(1)  # a row of zeros is the token of another expert
            rows = tokens[
                kept & self.tokens
                if self.tokens is not None and len(self.tokens) == len(kept)
                else kept
            ]
            key = (start, first + place)
            self._sums[key] = self._sums.get(key, 0) + rows.square().sum(0)
            self._counts[key] += len(rows)

    @torch.no_grad()
    def zero_smallest(self, layer: Layer, sparsity: float) -> None:
        own = _key(layer)
        siblings = {
            _key(other)
            for other in self._all
            if layer.siblings and other.siblings == layer.siblings
        }
        keys = siblings if siblings and self._counts[own] < self._enough else {own}
        if not keys & self._sums.keys():
            return
        total = sum(value for key, value in self._sums.items() if key in keys)
        rows = layer.own(layer.parameter)
        # Kernel positions, then channels: of equal scores (only padding) the first goes.
        if _is_convolution(layer):
            group, groups = layer.group or (0, 1)
            rows = rows.movedim(1, -1)
            total = total.chunk(groups)[group].movedim(1, -1)
        elif any(self._columns.get(start) for start, _ in keys):  # perhaps only siblings got tokens
            rows = rows.t()
        if not total.any():  # nothing to compare: the layer stays dense
            return
        for row, scores in zip(rows, rows.abs() * total.sqrt(), strict=True):
            smallest = scores.flatten().argsort(stable=True)[: int(scores.numel() * sparsity)]
            row[torch.unravel_index(smallest, row.shape)] = 0


def _key(layer: Layer) -> tuple[int, int]:
    return layer.parameter.data_ptr(), layer.expert or 0


def _is_convolution(layer: Layer) -> bool:
    return layer.expert is None and layer.parameter.ndim > 2


def _in_order(model: nn.Module, stops: Sequence[Stop], batches: list[Any]) -> list[Stop]:
    """Sort stops: the next one is the first in model order that is the next for any batch."""
    stop_of = {
        layer.parameter.data_ptr(): index
        for index, stop in enumerate(stops)
        for layer in stop.layers
    }
    routes = []
    for batch in batches:
        starts: list[int] = []
        with _Products(
            lambda weight, _, starts=starts: starts.append(weight.untyped_storage().data_ptr())
        ):
            _outputs(model, batch)
        routes.append(list(dict.fromkeys(stop_of[start] for start in starts if start in stop_of)))
    order: list[int] = []
    while any(routes):
        order.append(min(route[0] for route in routes if route))
        routes = [[index for index in route if index != order[-1]] for route in routes]
    return [stops[index] for index in order]


def check_units(family: Family, result: Result | None = None) -> Result:
    """Prune, shrink, save and load the model of a family; raise an error if its outputs change."""
    result = result or Result(family.kind, family.name, family.model)
    dense = _build(family)
    batches = family.batches()
    is_timm = family.kind == "timm"
    model = copy.deepcopy(dense)
    try:
        pattern = Structured(multiple_of=8 if is_timm else 1)  # the models of transformers are tiny
        report = prune(model, batches, 0.25, pattern=pattern, progress=False)
    except ValueError as error:
        if "finds no hidden units" not in str(error):
            raise
        result.folder = "no hidden units found"
        return result
    notes = [
        re.search(r"([\d,]+) of ([\d,]+) hidden units are zero", layer.note)
        for layer in report.layers
    ]
    numbers = [[int(number.replace(",", "")) for number in note.groups()] for note in notes if note]
    result.zero, result.width = (sum(each) for each in zip(*numbers, strict=True))
    zeros = copy.deepcopy(model)
    expected = [_floats(zeros, batch, is_timm) for batch in batches]
    taken = shrink(model, batches[0])
    result.removed, (before, after) = taken.units, taken.parameters
    result.smaller = 1 - after / before
    _assert_same(model, batches, expected, is_timm)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / re.sub(r"\W", "_", family.name)
        try:
            loaded, form = (
                _timm_folder(family, zeros, path) if is_timm else _transformers_folder(model, path)
            )
            _assert_same(loaded, batches, expected, is_timm)
            result.folder = form
        except Exception as error:
            result.folder = first_line(error)
    return result


def _floats(model: nn.Module, batch: Any, wide: bool) -> list[Tensor]:
    """Return the floating-point outputs, in float64 if `wide`: deep random networks amplify the errors of float32."""
    model, batch = copy.deepcopy((model, batch)) if wide else (model, copy.deepcopy(batch))
    if wide:
        model = model.double()
        batch = tree_map_only(Tensor, double, batch)
    torch.manual_seed(0)
    leaves = tree_leaves(_outputs(model, batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _assert_same(
    model: nn.Module, batches: Sequence[Any], expected: Sequence[Sequence[Tensor]], wide: bool
) -> None:
    """Raise an error unless the outputs are the expected ones, to rounding."""
    for batch, before in zip(batches, expected, strict=True):
        after = _floats(model, batch, wide)
        assert [x.shape for x in after] == [x.shape for x in before], "outputs have other shapes"
        for x, y in zip(before, after, strict=True):
            difference = torch.linalg.vector_norm(
                x.double() - y.double()
            ) / torch.linalg.vector_norm(x.double())
            # All zeros: not a number.
            assert not difference > 1e-4, f"outputs differ by {difference:.1e}"


def _transformers_folder(model: Any, folder: Path) -> tuple[nn.Module, str]:
    folder.mkdir()
    write_modeling_file(model, folder)
    model.save_pretrained(folder)
    own_file = bool(list(folder.glob("modeling_*.py")))
    classes = auto_classes(type(model), model.config)
    assert classes or not own_file, (
        f"no AutoModel class loads {type(model).__name__}, and its folder has a file"
    )
    auto = getattr(hf, classes[0]) if classes else type(model)
    loaded = auto.from_pretrained(folder, trust_remote_code=own_file, dtype=torch.float32)
    return without_cache(loaded).eval(), OWN_FILE if own_file else ORDINARY


def _timm_folder(family: Family, model: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    module = ImageClassifierModule(
        family.model, False, num_classes=16, model_kwargs=family.arguments()
    )
    module.model.load_state_dict(model.state_dict())
    module.eval().save_pretrained(folder, shrink=True)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return loaded, OWN_FILE if list(folder.glob("modeling_*.py")) else ORDINARY


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{Path(where.filename).name}:{where.lineno}"
    return f"{type(error).__name__}: {text[0][:300] if text else 'without a message'} ({line})"


def examine(family: Family) -> Result:
    """Call both checks, and return errors as results."""
    result = Result(family.kind, family.name, family.model)
    try:
        result = check(family)
        signal.signal(signal.SIGPROF, _out_of_time)
        signal.setitimer(signal.ITIMER_PROF, 60 * _MINUTES)
        check_units(family, result)
    except CannotBuild as error:
        result.cause = str(error)
        result.status = "cannot be built here"
    except Exception as error:
        if result.status == "passes":
            result.folder = first_line(error)
        else:
            result.cause = first_line(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return result


def _out_of_time(*_: Any) -> None:
    raise TimeoutError(f"not finished in {_MINUTES} minutes of processor time")
