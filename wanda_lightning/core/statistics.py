"""What a layer's inputs looked like, as sums over tokens.

Everything is a sum, so merging batches, ranks and resumed runs is `+`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from wanda_lightning.core.types import PerInput, Tokens


def _square_sum(tokens: Tokens) -> PerInput:
    # No matrix product: autocast and TF32 would round it.
    return tokens.square().sum(dim=0)


class InputStatistics:
    """Running sums over the tokens that entered a layer.

    Only the sums named in `needs` are kept. They are accumulated in float32, or in float64 for float64 inputs.

    Args:
        needs: Names out of `SUMS`.

    Attributes:
        count: Number of tokens seen.
        sums: The sums by name; empty until the first token.

    Example:
        >>> inputs = InputStatistics({"square_sum"})
        >>> inputs.update(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> inputs.count, inputs.norm()
        (2, tensor([5., 1.]))
    """

    def __init__(self, needs: Iterable[str]) -> None:
        self.needs = frozenset(needs)
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        unknown = self.needs - SUMS.keys()
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}: the known ones are {sorted(SUMS)}")

    def update(self, tokens: Tokens) -> None:
        """Add a batch of tokens, one row each."""
        if tokens.shape[0] == 0:
            return
        # float32: squares of fp16 activations overflow in massive-activation channels.
        tokens = tokens.detach().to(torch.promote_types(tokens.dtype, torch.float32))
        self._add(tokens.shape[0], {name: SUMS[name](tokens) for name in self.needs})

    def merge(self, other: InputStatistics) -> None:
        """Add what another set of tokens gave."""
        assert other.needs == self.needs, "only statistics of one kind add up"
        self._add(other.count, other.sums)

    def _add(self, count: int, sums: dict[str, Tensor]) -> None:
        self.count += count
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def norm(self) -> PerInput:
        """The L2 norm of each input column over all tokens, `sqrt(sum of x²)`."""
        return self.sums["square_sum"].sqrt()

    def finite(self) -> Tensor:
        """Whether no token held NaN or infinity: a boolean scalar that stays on the inputs' device."""
        flags = [value.isfinite().all() for value in self.sums.values()]
        return torch.stack(flags).all() if flags else torch.tensor(True)


SUMS: dict[str, Callable[[Tensor], Tensor]] = {"square_sum": _square_sum}
