"""Find mixtures of experts, and everything in them that has an entry for each expert, by names and shapes.

Whether a mixture is right is measured by the caller: without some experts, it must compute the same as with these
experts unroutable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_lightning.models.experts import routers, stacked_experts
from wanda_lightning.models.layers import Layer
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.models.removable_units import Slot, Units

_NUMBER = re.compile(r"(\w+_)?(n|num)_(?!shared)(\w+_)?experts|out_features")  # names of attributes with the number
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one module, with their router."""

    name: str  # of the module that holds experts and routers
    module: nn.Module
    experts: nn.Module  # a list of modules, or a module with one parameter for all experts
    routers: tuple[nn.Module, ...]
    number: int  # of experts
    groups: int  # of consecutive experts among which the router chooses first; 1 if it does not
    slots: tuple[Slot, ...]  # tensors with an entry for each expert

    @property
    def is_list(self) -> bool:
        """Whether each expert is a module."""
        return isinstance(self.experts, nn.ModuleList)

    @property
    def prefix(self) -> str:
        """The start of the names of everything in the experts."""
        name = next(name for name, child in self.module.named_children() if child is self.experts)
        return f"{self.name}.{name}." if self.name else f"{name}."

    def index_of(self, layer: Layer) -> int | None:
        """Return to which expert a layer belongs; None if to none of them."""
        if not self.is_list:
            return layer.expert if layer.module is self.experts else None
        owners = (index for index, expert in enumerate(self.experts.children()) if layer.module in expert.modules())
        return next(owners, None)

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """The tensors with one number for each expert, such as biases of the router."""
        return tuple(slot.tensor.detach() for slot in self.slots if slot.tensor.numel() == self.number)

    def take(self, keep: Units) -> None:
        """Take all other experts out, in place."""
        new = [(slot, slot.taken(keep)) for slot in self.slots]
        for slot, tensor in new:
            setattr(slot.module, slot.name, tensor)
        if self.is_list:
            kept = [expert for expert, stays in zip(self.experts.children(), keep.tolist(), strict=True) if stays]
            self.experts._modules = {str(index): expert for index, expert in enumerate(kept)}
        set_number(self.module.modules(), self.number, int(keep.sum()))
        torch.clear_autocast_cache()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo `take` at the end of this block."""
        tensors = [(slot, slot.tensor) for slot in self.slots]
        experts = self.experts._modules
        attributes = [(module, vars(module).copy()) for module in self.module.modules()]
        try:
            yield
        finally:
            self.experts._modules = experts
            for module, found in attributes:
                for key, value in found.items():
                    if type(value) is int:
                        setattr(module, key, value)
            for slot, tensor in tensors:
                setattr(slot.module, slot.name, tensor)
            torch.clear_autocast_cache()


def shapes_without(model: nn.Module, found: Iterable[Mixture], kept: int) -> dict[str, torch.Size]:
    """Return the shapes in the state dict of a model as they will be once each mixture has `kept` experts."""
    changed: dict[int, torch.Size] = {}
    gone: set[int] = set()
    for mixture in found:
        for slot in mixture.slots:
            before, after = slot.tensor.shape[: slot.dim], slot.tensor.shape[slot.dim + 1 :]
            changed[id(slot.tensor)] = torch.Size((*before, kept, *after))
        last = list(mixture.experts.children())[kept:] if mixture.is_list else []
        gone |= {id(tensor) for expert in last for tensor in expert.state_dict(keep_vars=True).values()}
    tensors = model.state_dict(keep_vars=True)
    return {name: changed.get(id(tensor), tensor.shape) for name, tensor in tensors.items() if id(tensor) not in gone}


def set_number(modules: Iterable[nn.Module], old: int, new: int) -> None:
    """Set the attributes of modules that hold the number of experts; `out_features` where it is no longer the shape."""
    for module in modules:
        for key, value in vars(module).copy().items():
            if type(value) is int and value == old and _NUMBER.fullmatch(key):
                weight = getattr(module, "weight", None)
                if key != "out_features" or (isinstance(weight, Tensor) and len(weight) == new):
                    setattr(module, key, new)


def mixtures(model: nn.Module) -> Iterator[Mixture]:
    """Yield the mixtures of experts in a model, in model order."""
    for name, module in named_modules(model).items():
        for child_name, experts in module.named_children():
            stacked = stacked_experts(experts)
            is_list = isinstance(experts, nn.ModuleList) and child_name.endswith("experts")
            if not stacked and not is_list:
                continue
            number = len(getattr(experts, min(stacked))) if stacked else len(experts)  # type: ignore[arg-type]
            found = routers({"": module})
            outer = tuple(child for child in module.children() if child in found)
            inner = [router for child in outer for router in child.modules()]
            routing = [slot for each in (module, *inner) for slot in _slots(each, number)]
            if number > 1 and any(slot.tensor.ndim == 2 for slot in routing if slot.module in found):
                own = [slot for each in experts.modules() for slot in _slots(each, number)] if stacked else []
                slots = (*routing, *(slot for slot in own if slot.dim == 0))
                yield Mixture(name, module, experts, outer, number, _groups((module, *inner), number), slots)


def _slots(module: nn.Module, number: int) -> Iterator[Slot]:
    """Yield the tensors of a module with one dimension for the experts."""
    for tensors in (module.named_parameters, module.named_buffers):
        for name, tensor in tensors(recurse=False):
            if number in tensor.shape:
                yield Slot(module, name, tuple(tensor.shape).index(number))


def _groups(modules: Iterable[nn.Module], number: int) -> int:
    """Return the number of groups of experts that a module of the router declares; 1 if none does."""
    found = (value for module in modules for key, value in vars(module).items() if _GROUPS.fullmatch(key))
    return next((value for value in found if type(value) is int and value > 1 and number % value == 0), 1)
