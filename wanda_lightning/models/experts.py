"""Where the experts of a mixture are, and which side of their matrices is the input."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def siblings_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """A glob for what this layer is in each module of a list of experts; `""` where it is in none."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        container = modules.get(".".join(parts[:end]))
        if parts[end - 1].endswith("experts") and isinstance(container, nn.ModuleList | nn.ModuleDict):
            return ".".join([*parts[:end], "*", *parts[end + 1 :]])
    return ""


def stacked_experts(module: nn.Module) -> set[str]:
    """The parameters of a module of which each holds one matrix for each expert, one behind the other.

    Recognised by the number of experts, which the module declares, or its `config` where its class says that it is
    of experts.
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


_ENTRY = re.compile(r"(^|_)(gate|up|in|input|w1|w3|fc1|wi)(_|$)")  # names of what reads the hidden states,
_EXIT = re.compile(r"(^|_)(down|out|output|w2|fc2|wo)(_|$)")  # and of what gives them
_HIDDEN = ("hidden_size", "hidden_dim", "d_model")


def stored_by_columns(modules: Mapping[str, nn.Module]) -> dict[type[nn.Module], bool]:
    """Of each class of experts, whether it stores their matrices as (d_in, d_out); missing where nothing says so.

    All modules of a class are asked, because square matrices do not tell.
    """
    found: dict[type[nn.Module], set[bool]] = {}
    for module_name, module in modules.items():
        for name in stacked_experts(module):
            _, first, second = getattr(module, name).shape
            votes = found.setdefault(type(module), set())
            declared = getattr(module, "is_transposed", None)
            sizes = [getattr(module, size, None) for size in ("input_size", "output_size")]
            enters, leaves = bool(_ENTRY.search(name)), bool(_EXIT.search(name))
            hidden = _hidden_size(module, module_name, modules)
            if isinstance(declared, bool):  # transformers' own word
                votes.add(declared)
            elif first != second and sorted(sizes, key=str) == sorted([first, second], key=str):
                votes.add(sizes == [first, second])
            elif enters != leaves and (first == hidden) != (second == hidden):
                votes.add((first == hidden) == enters)
    return {kind: votes.pop() for kind, votes in found.items() if len(votes) == 1}


def _hidden_size(module: nn.Module, module_name: str, modules: Mapping[str, nn.Module]) -> int | None:
    """The width of the hidden states, as the module declares it, or the configuration of what it is in."""
    parts = module_name.split(".")
    outer = [modules.get(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    for declares in (module, *(getattr(m, "config", None) for m in (module, *outer))):
        for key in _HIDDEN:
            if type(size := getattr(declares, key, None)) is int:
                return size
    return None


def routers(modules: Mapping[str, nn.Module]) -> set[nn.Module]:
    """What decides which experts a token goes to: it stands next to them."""
    found: set[nn.Module] = set()
    for module in modules.values():
        children = dict(module.named_children())
        experts = {
            name: child
            for name, child in children.items()
            if name.endswith(("expert", "experts")) or stacked_experts(child)
        }
        numbers = {1}  # a gate of the experts that all tokens go to
        for child in experts.values():
            numbers |= {len(getattr(child, name)) for name in stacked_experts(child)}
            numbers |= {len(child)} if isinstance(child, nn.ModuleList | nn.ModuleDict) else set()
        for name, child in children.items() if experts else ():
            weight = getattr(child, "weight", None)
            one_for_each = isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) in numbers
            if name not in experts and (name in ("router", "gate", "gating") or one_for_each):
                found.update(child.modules())
    return found
