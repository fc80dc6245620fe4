"""Prune one small random model of any family in transformers and timm, and check it.

`benchmarks/families.py` does so for all families. A family is a configuration class (transformers) or a module (timm);
`support.zoo` builds its model. `check` prunes it to 50 % and to 2:4, with sequential="block" and "layer" (timm models
also with "none"). The model passes if every matrix inside its blocks has exactly its sparsity or is skipped with a
reason, no skipped weight changed, all outputs are finite, and the masks for "block" equal, in float64, those of a slow
procedure that computes its own statistics (`slow_prune`).
`check_units` sets hidden units to zero and takes out all that are zero; the outputs must stay the same to
rounding, and the saved folder must load with transformers or timm and give these outputs again.
"""

from __future__ import annotations

import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import timm
import torch
import transformers as hf
from support.disk import weights
from support.quiet import prune, shrink, zero_units
from support.zoo import CannotBuild, cast, matrices, outputs, without_cache
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from wanda_lightning import ImageClassifierModule
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers
from wanda_lightning.units.fit_configuration import auto_classes, refuse_unloadable
from wanda_lightning.units.zero_units import take_out_zero_units

aten = torch.ops.aten
PATTERNS = ("unstructured", "2:4")
ORDINARY = "ordinary"
OWN_FILE = "with a modeling file"
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
    # The fraction of these parameters that stay dense, by reason.
    left_out: dict = field(default_factory=dict)
    slow: str = ""  # the dtype in which `block` equals the slow procedure
    width: int = 0  # hidden units that were found
    zero: int = 0  # those that were set to zero
    removed: int = 0  # those that were taken out
    smaller: float = 0.0  # fraction of all parameters that were taken out
    folder: str = ""  # how the smaller model is saved, or why it is not


def _finite(output):
    leaves = _floating_point(output)
    assert leaves, "the model returns no floating-point output"
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def _floating_point(output):
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check(family, slowly=True, ways=None):
    """Prune a model in every way, or in some, and check the result by assertions."""
    result = Result(family.kind, family.name, family.model)
    dense = _build(family)
    batches = family.batches()
    assert all(_finite(_outputs(dense, batch)) for batch in batches), "outputs of the dense model"
    if ways is None:
        ways = list(
            product(
                SEQUENTIAL_CHOICES if family.kind == "timm" else SEQUENTIAL_CHOICES[:2], PATTERNS
            )
        )

    for sequential, pattern in ways:
        model = deepcopy(dense)
        report = prune(
            model,
            family.batches(),
            0.5,
            pattern=pattern,
            sequential=sequential,
            keep_batch_norm=True,
        )
        verify(model, dense, report, pattern)
        finite = all(_finite(_outputs(model, batch)) for batch in family.batches())
        assert finite, f"not finite: {pattern}"
        if (sequential, pattern) == ("block", "unstructured"):
            result.coverage, result.left_out = _coverage(dense, report, family.batches())

    if slowly:
        result.slow = _compare(dense, family.batches())
    result.status = "passes"
    return result


def _build(family):
    """Return the dense model, which has run once."""
    try:
        model = family.build()
        for batch in family.batches():
            _outputs(model, batch)
    except Exception as error:
        raise CannotBuild(first_line(error)) from error
    return model


def verify(model, dense, report, pattern):
    """Check that each matrix is pruned or skipped, and that nothing but the pruned weights has changed."""
    layers = {layer.name: layer for layer in find_layers(model).layers}
    pruned = {layer.name: layers[layer.name] for layer in report.layers}
    listed = {*pruned, *(matrix.name for matrix in report.skipped)}
    for name in matrices(model, experts=False):
        is_listed = any(_inside(other, {name}) for other in listed)  # experts are listed one by one
        assert is_listed, f"neither pruned nor skipped: {name}"
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
        expected = before[name]
        if id(parameter) in written:
            expected = expected * (parameter != 0)
        assert torch.equal(parameter, expected), f"{name} changed"
    for (name, buffer), other in zip(model.named_buffers(), dense.buffers(), strict=True):
        assert torch.equal(buffer, other) or buffer.isnan().any(), f"buffer {name} changed"


_OUTSIDE = ("embedding", "output head", "stem", "tied to")


def _coverage(model, report, batches):
    """Return which fraction of the matrices inside the reached blocks is pruned, and why the rest is not."""
    idle = _idle_modules(model, batches)
    blocks = _blocks(model, idle)

    def counts(name):
        return _inside(name, blocks) and not _inside(name, idle)

    pruned = sum(layer.size for layer in report.layers if counts(layer.name))
    parameters = matrices(model, experts=False)
    left = Counter()  # sizes by reason
    for matrix in report.skipped:
        if matrix.name in parameters and not matrix.detail.startswith(_OUTSIDE):
            left[matrix.detail] += parameters[matrix.name].numel() * counts(matrix.name)
    total = max(1, pruned + left.total())
    return pruned / total, {reason: size / total for reason, size in left.most_common() if size}


def _inside(name, modules):
    return any(f"{name}.".startswith(f"{module}." if module else "") for module in modules)


def _idle_modules(model, batches):
    """Return the modules that no batch enters; no single layers, since another module may read their weights."""
    modules = dict(model.named_modules())
    called = set()
    with ExitStack() as hooks:
        for name, module in modules.items():
            entering = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            hooks.callback(entering.remove)
        for batch in batches:
            _outputs(model, batch)
    return {
        name
        for name, module in modules.items()
        if any(module.children()) and not any(_inside(other, {name}) for other in called)
    }


def _blocks(model, idle):
    """Return the repeated modules; the whole model if they hold less than half of the parameters."""
    repeated = set()
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            repeated.add(name)
        if isinstance(module, nn.ModuleList | nn.Sequential):
            repeated |= {f"{name}.{child}".lstrip(".") for child, _ in module.named_children()}

    inside = 0
    total = 0
    for name, parameter in matrices(model, experts=False).items():
        if "embed" not in name and not _inside(name, idle):
            total += parameter.numel()
            inside += parameter.numel() * _inside(name, repeated)
    return repeated if inside >= total / 2 else {""}


def _compare(dense, batches):
    """Return the dtype in which the masks for sequential="block" equal those of the slow procedure."""
    model = deepcopy(dense)
    if hasattr(model, "set_experts_implementation"):
        # Grouped products are not intercepted, and have no float64.
        model.set_experts_implementation("eager")
    narrow = deepcopy(model)
    wide_batches = cast(batches)
    try:
        model.double()
        for batch in wide_batches:
            _outputs(model, batch)
        batches = wide_batches
    except RuntimeError:  # some part of it always computes in float32
        model = narrow

    dtype = next(model.parameters()).dtype
    slow = deepcopy(model)
    prune(model, batches, 0.5, sequential="block")
    slow_prune(slow, batches)

    zeros = 0
    differing = {}
    for (name, weight), expected in zip(model.named_parameters(), slow.parameters(), strict=True):
        zeros += int((weight == 0).sum())
        different = int(((weight == 0) != (expected == 0)).sum())
        if different:
            differing[name] = different
    assert not differing, (
        f"{dtype}: {sum(differing.values())} of {zeros} zeros are not those of the slow procedure, "
        f"in {next(iter(differing))} first"
    )
    return str(dtype).removeprefix("torch.")


def slow_prune(model, batches, sequential="block"):
    """Prune half of each row with Wanda, stop by stop, in plain code.

    For each stop, every batch runs through the model as pruned so far, up to the first end of that stop. The inputs of
    a weight are read where PyTorch multiplies, below all modules. Padding is found in the products with as many tokens
    as the `attention_mask` has, so not in those of experts.
    """
    stops = find_layers(model, sequential).stops
    if sequential != "none":
        stops = _in_order(model, stops, batches)
    for stop in stops:
        sums = _InputSquares(stop.layers)
        handle = (stop.module or model).register_forward_hook(_end)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            sums.tokens = None if mask is None else mask.flatten().bool()
            with suppress(_StopDone), _Products(sums.on_product):
                _outputs(model, batch)
        handle.remove()
        for layer in stop.layers:
            sums.zero_smallest_half(layer)


class _StopDone(Exception):
    """The stop has run, so the rest of the model need not."""


def _end(*_):
    raise _StopDone


class _Products(TorchDispatchMode):
    """Call a function for each product, with the weight, and with the tokens that it multiplies.

    For a convolution, it gets the sum of x² that each weight multiplies, in the shape of the weight: the gradient of
    the summed output with respect to that weight, for the input x².
    """

    def __init__(self, on_product):
        super().__init__()
        self._on_product = on_product

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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

    For an expert that fewer than 32 tokens reach, the tokens of all experts count, as in `prune`.
    """

    def __init__(self, layers):
        self.tokens = None  # which tokens of the batch are no padding
        self._all = layers
        # By the address of the parameter: one of its experts stands for all.
        self._layers = {layer.parameter.data_ptr(): layer for layer in layers}
        # By the address of the parameter and the number of the expert.
        self._sums = {}
        self._counts = Counter()
        self._is_transposed = {}  # by the address: whether PyTorch multiplies by the weight as stored

    def on_product(self, weight, x):
        start = weight.untyped_storage().data_ptr()
        if start not in self._layers:
            return
        layer = self._layers[start]
        if _is_convolution(layer):
            self._sums[start, 0] = self._sums.get((start, 0), 0) + x
            return

        one = layer.own(layer.parameter)
        shape_and_stride = weight.shape[-2], weight.stride(-2)
        self._is_transposed[start] = shape_and_stride == (one.shape[0], one.stride(0))
        first = weight.storage_offset() // one.numel()
        for expert, tokens in enumerate(x if weight.ndim == 3 else [x], start=first):
            kept = tokens.any(1)  # a row of zeros is the token of another expert
            if self.tokens is not None and len(self.tokens) == len(kept):
                kept &= self.tokens
            rows = tokens[kept]
            key = (start, expert)
            self._sums[key] = self._sums.get(key, 0) + rows.square().sum(0)
            self._counts[key] += len(rows)

    @torch.no_grad()
    def zero_smallest_half(self, layer):
        keys = {_key(layer)}
        if layer.siblings and self._counts[_key(layer)] < 32:
            keys = {_key(other) for other in self._all if other.siblings == layer.siblings}
        sums = [value for key, value in self._sums.items() if key in keys]
        if not sums:
            return

        total = sum(sums)
        rows = layer.own(layer.parameter)
        if _is_convolution(layer):
            # Kernel positions, then channels: of equal scores (only padding) the first goes.
            group, groups = layer.group or (0, 1)
            rows = rows.movedim(1, -1)
            total = total.chunk(groups)[group].movedim(1, -1)
        # Perhaps only siblings got tokens.
        elif any(self._is_transposed.get(start) for start, _ in keys):
            rows = rows.t()

        if not total.any():  # nothing to compare: the layer stays dense
            return
        for row, scores in zip(rows, rows.abs() * total.sqrt(), strict=True):
            smallest = scores.flatten().argsort(stable=True)[: scores.numel() // 2]
            row[torch.unravel_index(smallest, row.shape)] = 0


def _key(layer):
    return layer.parameter.data_ptr(), layer.expert or 0


def _is_convolution(layer):
    return layer.expert is None and layer.parameter.ndim > 2


def _in_order(model, stops, batches):
    """Sort stops: the next one is the first in model order that is the next for any batch."""
    stop_of = {}  # the index of the stop, by the address of a parameter
    for index, stop in enumerate(stops):
        stop_of |= {layer.parameter.data_ptr(): index for layer in stop.layers}

    routes = []  # for each batch, the indices of its stops in the order in which it reaches them
    for batch in batches:
        route = {}

        def on_product(weight, _, route=route):
            start = weight.untyped_storage().data_ptr()
            if start in stop_of:
                route.setdefault(stop_of[start])

        with _Products(on_product):
            _outputs(model, batch)
        routes.append(list(route))

    order = []
    while any(routes):
        order.append(min(route[0] for route in routes if route))
        routes = [[index for index in route if index != order[-1]] for route in routes]
    return [stops[index] for index in order]


def check_units(family, result=None):
    """Shrink, save and load the model of a family; raise an error if its outputs change."""
    result = result or Result(family.kind, family.name, family.model)
    model = _build(family)
    batches = family.batches()
    is_timm = family.kind == "timm"
    try:
        multiple_of = 8 if is_timm else 1  # the models of transformers are tiny
        report = zero_units(model, batches, 0.25, multiple_of=multiple_of)
    except ValueError as error:
        if "finds no hidden units" not in str(error):
            raise
        result.folder = "no hidden units found"
        return result
    for layer in report.layers:
        note = re.search(r"([\d,]+) of ([\d,]+) hidden units removed", layer.note)
        if note:
            result.zero += int(note[1].replace(",", ""))
            result.width += int(note[2].replace(",", ""))

    zeros = deepcopy(model)
    expected = [_floats(zeros, batch, is_timm) for batch in batches]
    taken = take_out_zero_units(model, lambda: _outputs(model, batches[0]), progress=False)
    before, after = taken.parameters
    result.removed = taken.taken
    result.smaller = 1 - after / before
    _assert_same(model, batches, expected, is_timm)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / re.sub(r"\W", "_", family.name)
        try:
            if is_timm:
                loaded, form = _timm_folder(family, zeros, path)
            else:
                loaded, form = _transformers_folder(model, path)
            _assert_same(loaded, batches, expected, is_timm)
            result.folder = form
        except Exception as error:
            result.folder = first_line(error)
    return result


def _floats(model, batch, wide):
    """Return the floating-point outputs, in float64 if `wide`: deep random networks amplify the errors of float32."""
    batch = deepcopy(batch)  # a model may write into its input
    if wide:
        model = deepcopy(model).double()
        batch = cast(batch)
    torch.manual_seed(0)
    return _floating_point(_outputs(model, batch))


def _assert_same(model, batches, expected, wide):
    """Raise an error unless the outputs are the expected ones, to rounding."""
    for batch, before in zip(batches, expected, strict=True):
        after = _floats(model, batch, wide)
        assert [x.shape for x in after] == [x.shape for x in before], "outputs have other shapes"
        for x, y in zip(before, after, strict=True):
            difference = (x.double() - y.double()).norm() / x.double().norm()
            # `not`: the difference of zeros is not a number.
            assert not difference > 1e-4, f"outputs differ by {difference:.1e}"


def _transformers_folder(model, folder):
    refuse_unloadable(model)
    model.save_pretrained(folder)
    own_file = bool(list(folder.glob("modeling_*.py")))
    own = getattr(type(model), "shrunk_family", type(model))
    classes = auto_classes(own, model.config)
    fitting = [getattr(hf, auto) for auto, name in classes.items() if name == own.__name__]
    auto = (fitting or [type(model)])[0]
    loaded = auto.from_pretrained(folder, trust_remote_code=own_file, dtype=torch.float32)
    return without_cache(loaded).eval(), OWN_FILE if own_file else ORDINARY


def check_uneven(family):
    """Take units out of all blocks but the last; return whether vLLM and SGLang can build the model of the folder.

    None if the folder needs no file, since the family has a setting for these layers. Raises an error unless
    transformers builds the model, also without its head and without weights as they do, and its outputs stay the same.
    """
    model = _build(family)
    batches = family.batches()
    *_, last = [stop.name for stop in find_layers(model).stops if stop.is_block]
    zero_units(model, batches, 0.25, multiple_of=1, skip=[f"{last}.*"])
    expected = [_floats(deepcopy(model), batch, False) for batch in batches]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/dense")
        shrink(model, batches)
        path = Path(folder) / re.sub(r"\W", "_", family.name)
        loaded, form = _transformers_folder(model, path)
        if form == ORDINARY:
            return None
        _assert_same(loaded, batches, expected, False)
        assert weights(path).keys() == weights(Path(folder) / "dense").keys()
        config = hf.AutoConfig.from_pretrained(path, trust_remote_code=True)
        (architecture,) = config.architectures
        assert not hasattr(hf, architecture)
        with torch.device("meta"):
            base = hf.AutoModel.from_config(config, trust_remote_code=True)

    saved = loaded.state_dict()
    compared = 0
    for name, tensor in base.state_dict().items():
        stored = saved.get(name, saved.get(f"{base.base_model_prefix}.{name}"))
        if stored is not None:  # it may have a pooler that the head does not use
            assert tensor.shape == stored.shape
            compared += 1
    assert compared > len(config.shrunk_shapes)
    return base.is_backend_compatible()


def _timm_folder(family, model, folder):
    module = ImageClassifierModule(
        family.model, False, num_classes=16, model_kwargs=family.arguments()
    )
    module.model.load_state_dict(model.state_dict())
    shrink(module.eval().model)
    module.save_pretrained(folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return loaded, OWN_FILE if list(folder.glob("modeling_*.py")) else ORDINARY


def first_line(error):
    text = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{Path(where.filename).name}:{where.lineno}"
    message = text[0][:300] if text else "without a message"
    return f"{type(error).__name__}: {message} ({line})"
