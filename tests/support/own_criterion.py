"""A criterion outside of the package, made of public names only."""

from dataclasses import dataclass

from wanda_lightning import Criterion


@dataclass(frozen=True)
class Power(Criterion):
    needs = frozenset({"square_sum"})
    power: float = 0.5

    def __call__(self, weight, inputs):
        return weight.float().abs() * inputs.norm() ** self.power
