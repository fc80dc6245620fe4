"""Statistics of a layer's inputs are sums over tokens, so those of several batches or processes are added.

The second half of this file dampens, scales, factorizes and inverts Gram matrices `X^T X`, and measures errors with
them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import wide_dtype, widened
from wanda_lightning.core.types import Gram, PerInput, PerUnit, RowWeights, Tokens, Weight

log = logging.getLogger(__name__)
Derived = TypeVar("Derived")

_CHUNK = 2**18  # entries: few enough for a core's cache, enough for several cores
_WIDE = 512  # a Gram matrix of at least so many inputs is computed in halves


def sum_squares(tensor: Tensor) -> Tensor:
    """Return the sum of the squares over the first dimension, in float32 or wider."""
    # No matrix product: autocast and TF32 would round it.
    if tensor.device.type != "cpu" or not tensor.numel():
        return widened(tensor).square().sum(dim=0)

    # On one core, squares of 12.8 million numbers that are added up in the cache take 4 ms; written to memory first,
    # they take 29 ms.
    rows = max(1, _CHUNK * len(tensor) // tensor.numel())
    total = torch.zeros_like(tensor[:rows], dtype=wide_dtype(tensor))
    for chunk in tensor.split(rows):
        wide_chunk = widened(chunk)
        total[: len(chunk)].addcmul_(wide_chunk, wide_chunk)
    return total.sum(dim=0)


def _gram(tokens: Tokens) -> Gram:
    with torch.autocast(tokens.device.type, enabled=False), _full_precision():
        gram = tokens.new_empty(tokens.shape[1], tokens.shape[1])
        _write_gram(tokens, gram)
        return gram


def _write_gram(tokens: Tokens, gram: Gram) -> None:
    """Compute a little more than half of the products, and copy those above the diagonal to below it."""
    if len(gram) < _WIDE:
        torch.mm(tokens.t(), tokens, out=gram)
        return

    half = len(gram) // 2
    first = tokens[:, :half]
    second = tokens[:, half:]
    above_diagonal = gram[:half, half:]
    _write_gram(first, gram[:half, :half])
    _write_gram(second, gram[half:, half:])
    torch.mm(first.t(), second, out=above_diagonal)
    gram[half:, :half] = above_diagonal.t()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32: with TF32, the Gram matrix would have a precision of ten bits."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    backend_precisions = [backend.fp32_precision for backend in backends]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # PyTorch refuses to read it where it is "highest" and a backend's own setting is lower.
        precision = "highest"

    # This sets the backends, too; some kernels refuse settings that differ.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for backend, backend_precision in zip(backends, backend_precisions, strict=True):
            # A backend follows the common setting with "none"; only one that had a setting of its own gets it back.
            backend.fp32_precision = "none"
            if backend.fp32_precision != backend_precision:
                backend.fp32_precision = backend_precision


class GradientStatistics(NamedTuple):
    """Sums over tokens of a layer's inputs x and of the gradients g at its outputs."""

    inputs: PerInput  # x² * mean(g²), with the mean over the outputs
    rows: RowWeights  # g²
    # (x * h)², with the gradients h at the inputs, if hidden units are scored.
    units: PerUnit | None = None

    def row_weights(self) -> RowWeights:
        """Return `rows` divided by its mean; ones if all gradients are 0."""
        mean = self.rows.mean()
        if mean > 0:
            return self.rows / mean
        return torch.ones_like(self.rows)


class InputStatistics:
    """Running sums over the tokens that entered a layer.

    Only the sums named in `needs`, names from `SUMS`, are kept. They are accumulated in float32, or in float64 for
    float64 inputs. A method that needs no data gets `InputStatistics()`.

    Example:
        >>> inputs = InputStatistics({"square_sum"})
        >>> inputs.update(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> inputs.count, inputs.norm()
        (2, tensor([5., 1.]))
    """

    def __init__(self, needs: Iterable[str] = ()) -> None:
        self.needs = frozenset(needs)
        self.count = 0  # of tokens
        self.sums: dict[str, Tensor] = {}  # by name; empty until the first token
        # What layers with the same inputs compute only once, such as a factor of the Gram matrix.
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def merged(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Return the sum of at least one part."""
        total = cls(parts[0].needs)
        for part in parts:
            total.merge(part)
        return total

    def update(self, tokens: Tokens) -> None:
        """Add a batch of tokens, one row each."""
        if not len(tokens):
            return
        # float32: squares of fp16 activations overflow in massive-activation channels.
        tokens = widened(tokens.detach())
        self.add(len(tokens), {name: SUMS[name](tokens) for name in self.needs})

    def merge(self, other: InputStatistics) -> None:
        """Add the sums over another set of tokens."""
        assert other.needs == self.needs, "statistics of different kinds cannot be added"
        self.add(other.count, other.sums)

    def add(self, count: int, sums: Mapping[str, Tensor]) -> None:
        """Add sums over `count` tokens."""
        self.count += count
        self._derived.clear()
        for name, value in sums.items():
            if name in self.sums:
                value = self.sums[name] + value
            self.sums[name] = value

    def norm(self) -> PerInput:
        """Return the L2 norm of each input over all tokens, `sqrt(sum of x²)`."""
        return self.sums["square_sum"].sqrt()

    def inactive(self) -> Bool[Tensor, " d_in"]:
        """Return which inputs were zero in all tokens."""
        if "square_sum" in self.sums:
            return self.sums["square_sum"] == 0
        return self.sums["gram"].diagonal() == 0

    def inverse_factor(self, dampening: float) -> Gram:
        """Return what the function of this name returns for the Gram matrix, computed once."""
        return self._once(inverse_factor, dampening)

    def inverse_diagonal(self, dampening: float) -> PerInput:
        """Return the diagonal of `inverse_factor`."""
        return self.inverse_factor(dampening).diagonal()

    def scaled_gram(self, dampening: float) -> tuple[PerInput, Gram]:
        """Return what `scaled` returns for the Gram matrix, computed once."""
        return self._once(scaled, dampening)

    def mean(self) -> PerInput:
        """Return the mean of each input over all tokens."""
        return self.sums["sum"] / self.count

    def centered(self) -> InputStatistics:
        """Return the statistics with the Gram matrix of the inputs minus their means, computed once."""
        if "centered" not in self._derived:
            self._derived["centered"] = self._center()
        return self._derived["centered"]

    def _center(self) -> InputStatistics:
        raw = self.sums["gram"]
        gram = torch.addr(raw, self.sums["sum"], self.mean(), alpha=-1)

        # Rounding errors may be left of an input that hardly varies. If nothing else is, it is constant; if they
        # could make the matrix indefinite, as much is added to the diagonal.
        rounding = 64 * torch.finfo(raw.dtype).eps * raw.diagonal()
        is_constant = gram.diagonal() <= rounding / 16
        gram[is_constant] = 0
        gram[:, is_constant] = 0
        is_inexact = (gram.diagonal() < 64 * rounding) & ~is_constant
        gram.diagonal().add_(rounding * is_inexact)

        centered = InputStatistics(self.needs)
        centered.add(self.count, self.sums | {"gram": gram})
        return centered

    def forget_derived(self) -> None:
        """Free what layers with these inputs have shared; the next layer computes it again."""
        self._derived.clear()

    def columns(self, start: int, stop: int) -> InputStatistics:
        """Return the statistics that criteria read, for the inputs from `start` to `stop`."""
        return _ColumnStatistics(self, slice(start, stop))

    def _once(self, function: Callable[[Gram, float], Derived], dampening: float) -> Derived:
        key = (function, dampening)
        if key not in self._derived:
            self._derived[key] = function(self.sums["gram"], dampening)
        return self._derived[key]

    def finite(self) -> Tensor:
        """Return whether no token held NaN or infinity, as a boolean scalar on the inputs' device."""
        result = torch.tensor(True)
        for value in self.sums.values():
            # No entry of a Gram matrix is larger than the largest one on its diagonal.
            entries = value.diagonal() if value.ndim == 2 else value
            result = entries.isfinite().all() & result.to(value.device)
        return result


class _ColumnStatistics(InputStatistics):
    """The statistics of some inputs of a layer, without their Gram matrix."""

    def __init__(self, layer: InputStatistics, columns: slice) -> None:
        super().__init__(layer.needs - {"gram"})
        self.add(layer.count, {name: layer.sums[name][columns] for name in self.needs})
        self._layer = layer
        self._columns = columns

    def inverse_diagonal(self, dampening: float) -> PerInput:
        """Return the part of the layer's diagonal."""
        return self._layer.inverse_diagonal(dampening)[self._columns]


Inputs = Mapping[str, InputStatistics]
"""Statistics by the name of the layer."""

SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "square_sum": sum_squares,
    "gram": _gram,
    "sum": lambda tokens: tokens.sum(dim=0),
}


# ---- the Gram matrix

_ATTEMPTS = 5  # each with ten times the dampening of the previous one
_ROWS = 256  # enough for an error; all rows of a large layer would take several percent of a forward pass


def dampen_(gram: Gram, dampening: float) -> Gram:
    """Add `dampening` times the mean diagonal of `X^T X` to its diagonal, in place.

    Example:
        >>> dampen_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5)
        tensor([[2., 0.],
                [0., 4.]])
    """
    mean = gram.diagonal().mean()
    # The identity if no input is active.
    gram.diagonal().add_(torch.where(mean > 0, mean * dampening, 1))
    return gram


def cholesky(gram: Gram, dampening: float) -> tuple[Gram, float]:
    """Return the lower triangular `L` with `L L^T` the dampened `X^T X`, and the dampening that was used.

    If rounding makes the matrix indefinite, the dampening grows until it is definite, and a warning is logged. Raises a
    ValueError if it stays indefinite.
    """
    for attempt in range(_ATTEMPTS):
        used = dampening * 10**attempt
        # LAPACK works in place if the matrix is stored by columns.
        lower = dampen_(gram.t().clone(memory_format=torch.contiguous_format).t(), used)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if failed:
            continue
        if attempt:
            text = "a Gram matrix has no Cholesky factor with dampening %g, so %g is used: give more samples"
            log.warning(text, dampening, used)
        return lower, used
    raise UserError(
        f"the Gram matrix of {len(gram)} inputs has no Cholesky factor, not even with dampening {used:g}. Give more "
        "calibration samples, or load the model in a wider dtype."
    )


def inverse_factor(gram: Gram, dampening: float) -> Gram:
    """Return the upper triangular `U` with `U^T U` the inverse of `X^T X`, dampened as by `cholesky`."""
    # In reverse order of the inputs, the inverse of the lower factor is the upper factor of the inverse.
    lower, _ = cholesky(gram.flip(0, 1), dampening)
    # Stored by columns, so that the solution overwrites it.
    inverse = torch.eye(len(gram), dtype=gram.dtype, device=gram.device).t()
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower  # before the copy that `flip` makes
    return inverse.flip(0, 1)


def scaled(gram: Gram, dampening: float) -> tuple[PerInput, Gram]:
    """Return a scale for each input, and the dampened Gram matrix of the inputs divided by it, whose diagonal is 1."""
    result = dampen_(gram.clone(), dampening)
    scale = result.diagonal().sqrt()
    return scale, result.div_(scale).div_(scale[:, None])


def relative_error(
    dense: Weight, pruned: Weight, gram: Gram, fitted: Gram | None = None
) -> float | None:
    """Return `||(W - W') X^T||^2 / ||W X^T||^2`, the relative squared error of a layer's outputs; None if it overflows.

    About 256 evenly spaced rows are compared. `fitted` is the Gram matrix for the error if it is not `gram`: the one
    of centered inputs if the bias was fitted, too.

    Example:
        >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), torch.eye(2))
        0.36
    """
    step = max(1, math.ceil(len(dense) / _ROWS))
    weight = dense[::step].to(gram.dtype)
    lost = weight - pruned[::step].to(gram.dtype)
    with torch.autocast(gram.device.type, enabled=False):
        lost_energy = _energy(lost, gram if fitted is None else fitted)
        energies = torch.stack([lost_energy, _energy(weight, gram)])

    error, energy = energies.tolist()  # both at once, since each read waits for the device
    if not math.isfinite(error + energy):
        return None
    if energy <= 0:
        return 0.0
    return max(0.0, error) / energy


def _energy(weight: Weight, gram: Gram) -> Tensor:
    """Return `||W X^T||^2`."""
    return (torch.mm(weight, gram) * weight).sum()
