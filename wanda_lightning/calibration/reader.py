"""Sum the tokens that enter the layers of a unit while one batch runs, and find NaN, infinity and overflow in them.

Reading each check immediately would make the CPU wait for the device once per batch and layer. Therefore the checks of
a unit stay on the device and are read together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.interception import Product
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer, fitting_mask
from wanda_lightning.parallel import Processes


class Identity:
    """Identifies an input without keeping it alive, so that layers with the same input (q, k, v) share statistics."""

    def __init__(self, x: Tensor, layer: Layer, call: int = 0) -> None:
        self._reference, self._version, self._window = weakref.ref(x), _version(x, call), layer.window

    def matches(self, x: Tensor, layer: Layer, call: int = 0) -> bool:
        """Whether a layer's input is the same tensor, unmodified, with the same tokens.

        A tensor of inference mode has no version that would show a modification, so it only matches in the same call.
        """
        return self._reference() is x and self._version == _version(x, call) and self._window == layer.window


def _version(tensor: Tensor, call: int) -> int:
    return -1 - call if tensor.is_inference() else tensor._version


class Check(NamedTuple):
    """Whether the sums over one input of one batch are finite."""

    layers: list[str]  # names of the layers with this input
    batch: int
    finite: Tensor  # a boolean scalar on the input's device


class Entry(NamedTuple):
    """One input of one batch."""

    identity: Identity
    layers: list[str]  # names of the layers with this input
    statistics: InputStatistics  # sums over its tokens, except padding
    padding_counted: bool  # whether the batch may have padding that could not be left out


class BatchReader:
    """Reads the tokens of each layer while one batch runs; called in place of each product."""

    def __init__(self, needs: frozenset[str], sample: Sample) -> None:
        self.entries: list[Entry] = []  # one for each distinct input
        self.checks: list[Check] = []
        self.not_routed: set[str] = set()  # experts to which the model passes every token
        self._needs, self._batch, self._masks = needs, sample.batch_index, sample.masks
        self._calls = 0
        self._last: dict[tuple[nn.Module, int | None], Tensor] = {}  # the last `keep` of each expert

    def __call__(self, products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        """Read the tokens of the products, and return the result of the multiplication."""
        self._calls += 1
        for product in products:
            if product.row == 0:  # every piece has the same tokens
                self.read(product)
        if all(product.slot is not None and product.tokens.any(dim=-1).all() for product in products):
            self.not_routed.update(product.layer.name for product in products)
        return multiply()

    def read(self, product: Product) -> None:
        """Sum the tokens of a product, unless another layer had the same input."""
        layer, x = product.layer, product.tokens
        # A search through the entries of many experts is slow, and only the latest entry can match.
        for entry in self.entries if layer.expert is None else self.entries[-1:]:
            if entry.identity.matches(x, layer, self._calls):
                entry.layers.append(layer.name)
                return
        has_padding = bool(self._masks) and layer.kind.channels > -3  # images have no padding
        if layer.kind.channels < -1 and not has_padding:
            self._read_images(layer, x)
        else:
            self._read_tokens(product, has_padding)

    def _read_images(self, layer: Layer, x: Tensor) -> None:
        """Sum the tokens of a convolution, all of which count, without forming all of them at once."""
        images = (x if x.ndim == 1 - layer.kind.channels else x.unsqueeze(0)).detach()
        statistics = InputStatistics(self._needs)
        entry = Entry(Identity(x, layer, self._calls), [layer.name], statistics, padding_counted=False)
        if self._needs == {"square_sum"}:
            squares = _fitting(layer.squares(images), layer, x)
            statistics.add(len(images) * len(squares), {"square_sum": squares.sum(dim=0)})
        else:
            for tokens in layer.token_parts(images):
                statistics.update(_fitting(tokens, layer, x))
        self._add(entry)

    def _read_tokens(self, product: Product, has_padding: bool) -> None:
        layer, x = product.layer, product.tokens
        tokens = layer.tokens(x)
        if layer.expert is None:
            _fitting(tokens, layer, x)
        keep = self._real_tokens(product, tokens) if has_padding else None
        padding_counted = has_padding and keep is None
        if product.slot is not None:
            routed = tokens.any(dim=1)  # tokens of other experts are zeros
            keep = routed if keep is None else routed & keep
        if keep is not None:
            tokens = tokens[keep.flatten().to(tokens.device)]
        entry = Entry(Identity(x, layer, self._calls), [layer.name], InputStatistics(self._needs), padding_counted)
        entry.statistics.update(tokens)
        self._add(entry)

    def _add(self, entry: Entry) -> None:
        """Add an entry, and check its sums if any token counts."""
        self.entries.append(entry)
        if entry.statistics.count:
            self.checks.append(Check(entry.layers, self._batch, entry.statistics.finite()))

    def _real_tokens(self, product: Product, tokens: Tensor) -> Tensor | None:
        """Return which tokens are not padding; None if that is unknown.

        An expert gets a subset of the tokens, so the mask applies only through the indices of the gathered rows.
        """
        layer, x = product.layer, product.tokens
        if layer.expert is None:
            samples = len(x) if x.ndim == 1 - layer.kind.channels else 1
            mask = fitting_mask(
                self._masks, layer.name, x if layer.kind.channels == -1 else tokens.unflatten(0, (samples, -1))
            )
            return mask.keep if mask else None
        keep = None
        if product.gathered:
            whole, rows = product.gathered
            if mask := fitting_mask(self._masks, layer.name, whole):
                keep = mask.keep.flatten().to(rows.device)[rows]
        elif (last := self._last.get((layer.module, layer.expert))) is not None and len(last) == len(tokens):
            keep = last  # the second matrix of an expert gets the same tokens as the first
        elif mask := fitting_mask(self._masks, layer.name, x):
            keep = mask.keep.flatten().to(tokens.device)
        if keep is not None:
            self._last[layer.module, layer.expert] = keep
        return keep


def _fitting(tokens: Tensor, layer: Layer, x: Tensor) -> Tensor:
    """Return the tokens, or refuse those that do not have the width of the layer."""
    if tokens.shape[1] != layer.shape[1]:
        raise UserError(
            f"batches must fit the model, but the input of {layer.name} has shape {tuple(x.shape)} and the layer "
            f"takes {layer.shape[1]} features. Check how the batches are made."
        )
    return tokens


def refuse_nonfinite(checks: Sequence[Check], processes: Processes) -> None:
    """Read all checks, and refuse sums that are not finite."""
    by_device: dict[torch.device, list[Tensor]] = {}  # a model may use several devices
    for check in checks:
        by_device.setdefault(check.finite.device, []).append(check.finite)
    if all(torch.stack(flags).all() for flags in by_device.values()):
        return
    bad = next(check for check in checks if not check.finite)
    whose = f" of process {processes.rank}" if processes.world_size > 1 else ""
    raise UserError(
        f"calibration batches must give finite activations, but the input of {', '.join(bad.layers)} holds NaN or "
        f"infinity, or its squares overflow float32, in calibration batch {bad.batch}{whose} (counted from 0). Check "
        "that batch, or load the model in a wider dtype (float32 or bfloat16 rather than float16)."
    )
