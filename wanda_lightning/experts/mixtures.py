"""Find mixtures of experts, and everything in them that has an entry for each expert, by names and shapes.

Whether a mixture is right is measured by the caller: without some experts, it must compute the same as with these
experts unroutable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from wanda_lightning.core.types import Units
from wanda_lightning.models import own_tensors
from wanda_lightning.models.expert_stacks import routers, stacked_experts
from wanda_lightning.models.layers import named_modules
from wanda_lightning.units.candidates import Slot, replace_attributes

# Names of attributes with the number of experts.
_NUMBER = re.compile(r"(\w+_)?(n|num)_(?!shared)(\w+_)?experts")
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one module, with their router."""

    name: str  # of the module that holds experts and routers
    module: nn.Module
    experts: nn.Module  # its parameters have one matrix for each expert
    prefix: str  # of the names of these matrices
    routers: tuple[nn.Module, ...]
    number: int  # of experts
    groups: int  # of consecutive experts among which the router chooses first; 1 if it does not
    slots: tuple[Slot, ...]  # tensors with an entry for each expert
    # Attributes of the module, and inside, that hold the number of experts.
    counters: tuple[tuple[nn.Module, str], ...]

    def take(self, keep: Units) -> Callable[[], None]:
        """Take all other experts out, in place, and return a function that undoes it."""
        tensors = [(slot.module, slot.name, slot.taken(keep)) for slot in self.slots]
        return replace_attributes(
            [*tensors, *((module, name, int(keep.sum())) for module, name in self.counters)]
        )

    def drop_data(self) -> Callable[[], None]:
        """Move the tensors to the meta device, and return a function that undoes it."""
        moved = [
            (slot.module, slot.name, slot.like(slot.tensor.detach().to("meta")))
            for slot in self.slots
        ]
        return replace_attributes(moved)


def mixtures(model: nn.Module) -> Iterator[Mixture]:
    """Yield the mixtures of experts in a model, in model order; experts that are modules of their own are none."""
    modules = named_modules(model)
    for prefix, experts in modules.items():
        if not (stacked := stacked_experts(experts)):
            continue
        name = prefix.rpartition(".")[0]
        module = modules[name]
        number = len(getattr(experts, min(stacked)))
        found = routers({"": module})
        outer = tuple(child for child in module.children() if child in found)
        routing = [module, *(router for child in outer for router in child.modules())]
        slots = [slot for each in routing for slot in _slots(each, number)]
        if number == 1 or not any(slot.tensor.ndim == 2 for slot in slots if slot.module in found):
            continue
        rows = [(slot.module, "out_features") for slot in slots if slot.name == "weight"]
        counters = [(each, key) for each, key in rows if vars(each).get(key) == number]
        counters += counters_in(module, number)
        slots += [
            slot for each in experts.modules() for slot in _slots(each, number) if slot.dim == 0
        ]
        grouping = [
            vars(each)[key] for each in routing for key in vars(each) if _GROUPS.fullmatch(key)
        ]
        groups = next(
            (
                value
                for value in grouping
                if type(value) is int and value > 1 and number % value == 0
            ),
            1,
        )
        yield Mixture(
            name, module, experts, prefix, outer, number, groups, tuple(slots), tuple(counters)
        )


def counters_in(module: nn.Module, number: int) -> list[tuple[nn.Module, str]]:
    """Return the attributes that hold a number of experts, of a module and all modules inside."""
    inside = [
        (each, key) for each in module.modules() for key in vars(each) if _NUMBER.fullmatch(key)
    ]
    return [(each, key) for each, key in inside if vars(each)[key] == number]


def _slots(module: nn.Module, number: int) -> Iterator[Slot]:
    """Yield the tensors of a module with one dimension for the experts."""
    for name, tensor in own_tensors(module):
        if number in tensor.shape:
            yield Slot(module, name, tuple(tensor.shape).index(number))
