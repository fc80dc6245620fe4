"""Find the experts and routers of a mixture of experts, and the input dimension of the experts' matrices."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn import Module
from torch.nn.parameter import UninitializedParameter

Modules = Mapping[str, Module]
"""Modules of a model by name."""

_EXPERT_LISTS = (nn.ModuleList, nn.ModuleDict)


def siblings_of(name: str, modules: Modules) -> str:
    """Return a glob that matches this layer in every expert of its list; `""` if it is in no list of experts."""
    components = name.split(".")
    for end in range(1, len(components) - 1):
        container = modules.get(".".join(components[:end]))
        if components[end - 1].endswith("experts") and isinstance(container, _EXPERT_LISTS):
            return ".".join([*components[:end], "*", *components[end + 1 :]])
    return ""


def stacked_experts(module: Module) -> set[str]:
    """Return the names of a module's parameters that hold one matrix for each expert.

    Such a parameter has three dimensions, and its length is a number of experts: an integer attribute, with "expert" in
    its name, of the module; or of the module's `config` if the name of its class contains "expert".
    """
    numbers = _expert_numbers(vars(module))
    if "expert" in type(module).__name__.lower():
        config = getattr(module, "config", None)
        numbers |= _expert_numbers(getattr(config, "__dict__", {}))

    return {
        name
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if not isinstance(parameter, UninitializedParameter)
        and parameter.ndim == 3
        and len(parameter) in numbers
    }


def _expert_numbers(attributes: Mapping[str, object]) -> set[int]:
    """Return the values of attributes that may say how many experts there are."""
    return {
        value
        for name, value in attributes.items()
        if "expert" in name and "per_tok" not in name and type(value) is int
    }


# Names of matrices that read the hidden states.
_ENTRY = re.compile(r"(^|_)(gate|up|in|input|w1|w3|fc1|wi)(_|$)")
# Names of matrices that return to the hidden states.
_EXIT = re.compile(r"(^|_)(down|out|output|w2|fc2|wo)(_|$)")
_HIDDEN_SIZES = ("hidden_size", "hidden_dim", "d_model")


def stored_by_columns(modules: Modules) -> dict[type[Module], bool]:
    """Return for each class of stacked experts whether it stores the matrices as (d_in, d_out).

    A square matrix does not show its layout, so all modules of a class vote. A class without an unambiguous vote is
    missing from the result.
    """
    votes: dict[type[Module], set[bool]] = {}
    for module_name, module in modules.items():
        for parameter_name in stacked_experts(module):
            vote = _is_by_columns(module, module_name, parameter_name, modules)
            if vote is not None:
                votes.setdefault(type(module), set()).add(vote)
    return {kind: answers.pop() for kind, answers in votes.items() if len(answers) == 1}


def _is_by_columns(
    module: Module, module_name: str, parameter_name: str, modules: Modules
) -> bool | None:
    """Return whether a parameter holds matrices (d_in, d_out); None if nothing shows it."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):  # transformers sets it
        return declared

    _, first, second = getattr(module, parameter_name).shape
    sizes = [getattr(module, "input_size", None), getattr(module, "output_size", None)]
    if first != second and sizes in ([first, second], [second, first]):
        return sizes == [first, second]

    is_entry = bool(_ENTRY.search(parameter_name))
    is_exit = bool(_EXIT.search(parameter_name))
    hidden = _hidden_size(module, module_name, modules)
    if is_entry != is_exit and (first == hidden) != (second == hidden):
        return (first == hidden) == is_entry
    return None


def _hidden_size(module: Module, module_name: str, modules: Modules) -> int | None:
    """Return the width of the hidden states that the module declares, or the config of the module or one around it."""
    declaring: list[object] = [module]
    components = module_name.split(".")
    for length in range(len(components), -1, -1):
        outer = modules.get(".".join(components[:length]))
        declaring.append(getattr(outer, "config", None))

    for declares in declaring:
        for key in _HIDDEN_SIZES:
            size = getattr(declares, key, None)
            if type(size) is int:
                return size
    return None


def routers(modules: Modules) -> set[Module]:
    """Return the modules that route tokens to experts: siblings of the experts with a router's name or shape."""
    routing: set[Module] = set()
    for module in modules.values():
        children = dict(module.named_children())
        experts = {
            name: child
            for name, child in children.items()
            if name.endswith(("expert", "experts")) or stacked_experts(child)
        }
        if not experts:
            continue

        numbers = _numbers_of_experts(experts.values())
        for name, child in children.items():
            weight = getattr(child, "weight", None)
            has_row_for_each = (
                isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) in numbers
            )
            is_router = name in ("router", "gate", "gating") or has_row_for_each
            if is_router and name not in experts:
                routing.update(child.modules())
    return routing


def _numbers_of_experts(experts: Iterable[Module]) -> set[int]:
    """Return how many rows a router of these experts may have."""
    numbers = {1}  # the gate of shared experts has one row
    for module in experts:
        numbers.update(len(getattr(module, name)) for name in stacked_experts(module))
        if isinstance(module, _EXPERT_LISTS):
            numbers.add(len(module))
    return numbers
