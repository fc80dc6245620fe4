"""Find mixtures of experts, and everything in them that has an entry for each expert, by names and shapes.

Whether a mixture is right is measured by the caller: without some experts, it must compute the same as with these
experts unroutable.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.nn import Module

from wanda_lightning.common.aliases import Action
from wanda_lightning.core.types import Units
from wanda_lightning.models import own_tensors
from wanda_lightning.models.expert_stacks import routers, stacked_experts
from wanda_lightning.models.layers import named_modules
from wanda_lightning.units.candidates import Change, Slot, replace_attributes

# Names of attributes with the number of experts.
_NUMBER = re.compile(r"(\w+_)?(n|num)_(?!shared)(\w+_)?experts")
# Names of attributes with the number of experts, and of groups, that a router chooses for a token.
PER_TOKEN = re.compile(r"top_?k|num_experts_per_tok(en)?")
CHOSEN_GROUPS = re.compile(r"top_?k_groups?")
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")


class Mixture(NamedTuple):
    """The routed experts of one module, with their router."""

    name: str  # of the module that holds experts and routers
    module: Module
    experts: Module  # its parameters have one matrix for each expert
    prefix: str  # of the names of these matrices
    routers: tuple[Module, ...]
    number: int  # of experts
    groups: int  # of consecutive experts among which the router chooses first; 1 if it does not
    slots: tuple[Slot, ...]  # tensors with an entry for each expert
    # Attributes of the module, and inside, that hold the number of experts.
    counters: tuple[tuple[Module, str], ...]

    def take(self, keep: Units) -> Action:
        """Take all other experts out, in place, and return a function that undoes it."""
        number = int(keep.sum())
        changes: list[Change] = [(slot.module, slot.name, slot.taken(keep)) for slot in self.slots]
        changes += [(module, name, number) for module, name in self.counters]
        return replace_attributes(changes)

    def declared(self, names: re.Pattern[str]) -> int:
        """Return the largest number that the module or a router has under one of these names; 0 if there is none."""
        numbers = [
            value
            for part in (self.module, *self.routers)
            for key, value in vars(part).items()
            if names.fullmatch(key) and type(value) is int
        ]
        return max(numbers, default=0)

    def drop_data(self) -> Action:
        """Move the tensors to the meta device, and return a function that undoes it."""
        changes = []
        for slot in self.slots:
            empty = slot.like(slot.tensor.detach().to("meta"))
            changes.append((slot.module, slot.name, empty))
        return replace_attributes(changes)


def mixtures(model: Module) -> Iterator[Mixture]:
    """Yield the mixtures whose experts are stacked in one parameter, in model order; lists of modules are left out."""
    modules = named_modules(model)
    for prefix, experts in modules.items():
        stacked = stacked_experts(experts)
        if not stacked:
            continue
        name = prefix.rpartition(".")[0]
        number = len(getattr(experts, min(stacked)))
        mixture = _mixture(name, modules[name], prefix, experts, number)
        if mixture:
            yield mixture


def _mixture(
    name: str, module: Module, prefix: str, experts: Module, number: int
) -> Mixture | None:
    """Return the mixture of these experts; None if no router has a row for each."""
    all_routers = routers({"": module})
    outer_routers = tuple(child for child in module.children() if child in all_routers)
    routing = [module]
    for router in outer_routers:
        routing += router.modules()

    slots = [slot for part in routing for slot in _slots(part, number)]
    has_rows = any(slot.tensor.ndim == 2 for slot in slots if slot.module in all_routers)
    if number == 1 or not has_rows:
        return None

    counters = [
        (slot.module, "out_features")
        for slot in slots
        if slot.name == "weight" and vars(slot.module).get("out_features") == number
    ]
    counters += counters_in(module, number)
    for part in experts.modules():
        slots += [slot for slot in _slots(part, number) if slot.dim == 0]
    return Mixture(
        name=name,
        module=module,
        experts=experts,
        prefix=prefix,
        routers=outer_routers,
        number=number,
        groups=_groups(routing, number),
        slots=tuple(slots),
        counters=tuple(counters),
    )


def _groups(routing: Sequence[Module], number: int) -> int:
    """Return the number of groups that the modules declare, if the experts divide into them; else 1."""
    for module in routing:
        for key, value in vars(module).items():
            if _GROUPS.fullmatch(key) and type(value) is int and value > 1 and number % value == 0:
                return value
    return 1


def counters_in(module: Module, number: int) -> list[tuple[Module, str]]:
    """Return the attributes of a module and its submodules that hold this number of experts."""
    return [
        (part, key)
        for part in module.modules()
        for key, value in vars(part).items()
        if _NUMBER.fullmatch(key) and value == number
    ]


def _slots(module: Module, number: int) -> Iterator[Slot]:
    """Yield the tensors of a module with one dimension for the experts."""
    for name, tensor in own_tensors(module):
        if number in tensor.shape:
            yield Slot(module, name, tuple(tensor.shape).index(number))
