"""Sum the tokens that enter the layers of a unit while one batch runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from wanda_lightning.calibration.interception import Product
from wanda_lightning.calibration.nonfinite import Check, Location, locate
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer, TokenMask, fitting_mask


@dataclass(frozen=True)
class Identity:
    """Identifies an input without keeping it alive, so that layers with the same input (q, k, v) share statistics."""

    reference: weakref.ref[Tensor]
    version: int
    window: object

    @classmethod
    def of(cls, tensor: Tensor, layer: Layer) -> Identity:
        """Identify the input of a layer."""
        return cls(weakref.ref(tensor), _version(tensor), layer.window)

    def matches(self, tensor: Tensor, layer: Layer) -> bool:
        """Whether a layer's input is the same tensor, unmodified, with the same tokens."""
        unchanged = self.reference() is tensor and self.version == _version(tensor)
        return unchanged and self.window == layer.window


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass
class Entry:
    """One input of one batch.

    Attributes:
        identity: Identifies the tensor.
        layers: Names of the layers with this input.
        statistics: Sums over its tokens, except padding.
        location: Location of the largest activation; None if there is no token except padding.
        padding_counted: Whether the batch may have padding that could not be left out.
    """

    identity: Identity
    layers: list[str]
    statistics: InputStatistics
    location: Location | None
    padding_counted: bool

    def checks(self, batch: int) -> list[Check]:
        """Return the check for NaN and infinity, if there is any token."""
        if self.location is None:
            return []
        return [Check(self.layers, batch, self.statistics.finite(), self.location)]


class BatchReader:
    """Reads the tokens of each layer while one batch runs; called in place of each product.

    Args:
        needs: Names of the sums.
        masks: The padding of the batch.

    Attributes:
        entries: One for each distinct input.
        not_routed: Experts to which the model passes every token.
        rows_of: See `WeightInterceptor.rows_of`.
    """

    def __init__(self, needs: frozenset[str], masks: tuple[TokenMask, ...]) -> None:
        self.entries: list[Entry] = []
        self.not_routed: set[str] = set()
        self.rows_of: Callable[[Tensor], tuple[Tensor, Tensor] | None] = lambda x: None
        self._needs, self._masks = needs, masks
        self._last: dict[tuple[nn.Module, int | None], Tensor] = {}  # the last `keep` of each expert

    def __call__(self, products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        """Read the tokens of the products, and return the result of the multiplication."""
        for product in products:
            if product.first:
                self._read_product(product)
        if all(product.slot is not None and product.tokens.any(dim=-1).all() for product in products):
            self.not_routed.update(product.layer.name for product in products)
        return multiply()

    def _read_product(self, product: Product) -> None:
        layer, x = product.layer, product.tokens
        # A search through the entries of many experts is slow, and only the latest entry can match.
        for entry in self.entries if layer.expert is None else self.entries[-1:]:
            if entry.identity.matches(x, layer):
                entry.layers.append(layer.name)
                return
        if layer.expert is None:
            self.read(layer, x)
        else:
            self._read_expert(product)

    def read(self, layer: Layer, x: Tensor) -> Entry:
        """Sum the tokens that enter a layer that is not an expert.

        Raises:
            ValueError: If they do not have the width of the layer.
        """
        tokens = layer.tokens(x)
        if tokens.shape[1] != layer.shape[1]:
            raise ValueError(
                f"batches must fit the model, but the input of {layer.name} has shape {tuple(x.shape)} and the layer "
                f"takes {layer.shape[1]} features. Check how the batches are made."
            )
        shape, keep = _token_shape(layer, x, tokens), None
        padding_counted = False
        if self._masks and layer.kind.channels > -3:  # images have no padding
            mask = fitting_mask(self._masks, layer.name, x if layer.kind.channels == -1 else tokens.unflatten(0, shape))
            padding_counted = mask is None
            if mask is not None:
                shape, keep = tuple(mask.keep.shape), mask.keep
                tokens = tokens[keep.flatten().to(tokens.device)]
        return self._add(layer, x, tokens, shape, keep, padding_counted)

    def _read_expert(self, product: Product) -> None:
        layer, x = product.layer, product.tokens
        tokens = layer.tokens(x)
        keep = self._real_rows(layer, x, tokens) if self._masks else None
        padding_counted = bool(self._masks) and keep is None
        if product.slot is not None:
            routed = tokens.any(dim=1)  # tokens of other experts are zeros
            keep = routed if keep is None else routed & keep
        kept = tokens if keep is None else tokens[keep]
        self._add(layer, x, kept, (len(tokens),), keep, padding_counted)

    def _add(
        self,
        layer: Layer,
        x: Tensor,
        tokens: Tensor,
        shape: tuple[int, ...],
        keep: Tensor | None,
        padding_counted: bool,
    ) -> Entry:
        """Add an entry for the tokens that count: from all tokens of shape `shape`, those in `keep`."""
        statistics = InputStatistics(self._needs)
        statistics.update(tokens)
        location = locate(tokens, shape, keep) if tokens.numel() else None
        entry = Entry(Identity.of(x, layer), [layer.name], statistics, location, padding_counted)
        self.entries.append(entry)
        return entry

    def _real_rows(self, layer: Layer, x: Tensor, tokens: Tensor) -> Tensor | None:
        """Return which tokens of an expert are not padding; None if that is unknown.

        An expert gets a subset of the tokens, so the mask applies only through the indices of the gathered rows.
        """
        keep = None
        if gathered := self.rows_of(x):
            whole, rows = gathered
            if mask := fitting_mask(self._masks, layer.name, whole):
                keep = mask.keep.flatten().to(rows.device)[rows]
        elif (last := self._last.get((layer.module, layer.expert))) is not None and len(last) == len(tokens):
            keep = last  # the second matrix of an expert gets the same tokens as the first
        elif mask := fitting_mask(self._masks, layer.name, x):
            keep = mask.keep.flatten().to(tokens.device)
        if keep is not None:
            self._last[layer.module, layer.expert] = keep
        return keep


def _token_shape(layer: Layer, x: Tensor, tokens: Tensor) -> tuple[int, ...]:
    if layer.kind.channels < -1:
        samples = len(x) if x.ndim == 1 - layer.kind.channels else 1
        return samples, len(tokens) // samples
    return tuple(x.shape[:-1]) or (1,)
