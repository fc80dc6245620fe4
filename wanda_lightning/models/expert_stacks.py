"""Find the experts and routers of a mixture of experts, and the input dimension of the experts' matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def siblings_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a glob that matches this layer in every expert of its list; `""` if it is in no list of experts."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        container = modules.get(".".join(parts[:end]))
        if parts[end - 1].endswith("experts") and isinstance(
            container, nn.ModuleList | nn.ModuleDict
        ):
            return ".".join([*parts[:end], "*", *parts[end + 1 :]])
    return ""


def stacked_experts(module: nn.Module) -> set[str]:
    """Return the names of a module's parameters that hold one matrix for each expert.

    Such a parameter has three dimensions, and its length is a number of experts: an integer attribute, with "expert" in
    its name, of the module; or of the module's `config` if the name of its class contains "expert".
    """
    declaring: list[object] = [module]
    if "expert" in type(module).__name__.lower():
        declaring.append(getattr(module, "config", None))
    numbers = {
        value
        for declares in declaring
        for key, value in getattr(declares, "__dict__", {}).items()
        if "expert" in key and "per_tok" not in key and type(value) is int
    }
    return {
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not isinstance(parameter, UninitializedParameter)
        and parameter.ndim == 3
        and len(parameter) in numbers
    }


# Names of matrices that read the hidden states.
_ENTRY = re.compile(r"(^|_)(gate|up|in|input|w1|w3|fc1|wi)(_|$)")
# Names of matrices that return to the hidden states.
_EXIT = re.compile(r"(^|_)(down|out|output|w2|fc2|wo)(_|$)")
_HIDDEN = ("hidden_size", "hidden_dim", "d_model")


def stored_by_columns(modules: Mapping[str, nn.Module]) -> dict[type[nn.Module], bool]:
    """Return for each class of stacked experts whether it stores the matrices as (d_in, d_out).

    A square matrix does not show its layout, so all modules of a class vote. A class without an unambiguous vote is
    missing from the result.
    """
    found: dict[type[nn.Module], set[bool]] = {}
    for module_name, module in modules.items():
        for name in stacked_experts(module):
            _, first, second = getattr(module, name).shape
            votes = found.setdefault(type(module), set())
            declared = getattr(module, "is_transposed", None)
            sizes = [getattr(module, size, None) for size in ("input_size", "output_size")]
            enters = bool(_ENTRY.search(name))
            leaves = bool(_EXIT.search(name))
            hidden = _hidden_size(module, module_name, modules)
            if isinstance(declared, bool):  # transformers sets it
                votes.add(declared)
            elif first != second and sorted(sizes, key=str) == sorted([first, second], key=str):
                votes.add(sizes == [first, second])
            elif enters != leaves and (first == hidden) != (second == hidden):
                votes.add((first == hidden) == enters)
    return {kind: votes.pop() for kind, votes in found.items() if len(votes) == 1}


def _hidden_size(
    module: nn.Module, module_name: str, modules: Mapping[str, nn.Module]
) -> int | None:
    """Return the width of the hidden states that the module declares, or the config of the module or one around it."""
    parts = module_name.split(".")
    # The module is the first.
    around = [modules.get(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    for declares in (module, *(getattr(each, "config", None) for each in around)):
        for key in _HIDDEN:
            if type(size := getattr(declares, key, None)) is int:
                return size
    return None


def routers(modules: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Return the modules that route tokens to experts: siblings of the experts with a router's name or shape."""
    found: set[nn.Module] = set()
    for module in modules.values():
        children = dict(module.named_children())
        experts = {
            name: child
            for name, child in children.items()
            if name.endswith(("expert", "experts")) or stacked_experts(child)
        }
        numbers = {1}  # the gate of shared experts has one row
        for child in experts.values():
            numbers |= {len(getattr(child, name)) for name in stacked_experts(child)}
            numbers |= {len(child)} if isinstance(child, nn.ModuleList | nn.ModuleDict) else set()
        for name, child in children.items() if experts else ():
            weight = getattr(child, "weight", None)
            one_row_each = (
                isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) in numbers
            )
            if name not in experts and (name in ("router", "gate", "gating") or one_row_each):
                found.update(child.modules())
    return found
