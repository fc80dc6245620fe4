"""Find the layers to prune, group them in units, and give every other matrix its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.core.name_patterns import matches, refuse_unmatched
from wanda_lightning.core.patterns import Pattern, Unstructured
from wanda_lightning.models.experts import stored_by_columns
from wanda_lightning.models.inventory import Inventory, Skipped, Unit
from wanda_lightning.models.layers import Layer, layers_of
from wanda_lightning.models.quantized import is_packed, is_packed_weight, quantizer
from wanda_lightning.models.skips import packed, reasons_to_skip, why_no_layer

SequentialChoice = Literal["block", "layer", "none"]
SEQUENTIAL_CHOICES: tuple[str, ...] = get_args(SequentialChoice)


def find_layers(
    model: nn.Module,
    sequential: str = "block",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    include_grouped: bool = False,
    pattern: Pattern = Unstructured(),
) -> Inventory:
    """Find the layers to prune, group them in units, and give every other matrix its reason.

    Works on any device, the meta device included.

    Args:
        model: Any module.
        sequential: `"block"`, `"layer"` or `"model"`: what the units are.
        skip: Layers to leave dense: module names or globs (with everything inside), or `re:` and a regular expression
            that matches a whole name.
        only: The layers to prune, likewise, where not all; what `skip` names stays dense.
        include_grouped: Prune grouped convolutions, each group as a matrix of its own.
        pattern: Where zeros may fall; a layer that it does not fit is skipped.

    Raises:
        ValueError: If the sequential is unknown or a pattern in `skip` or `only` matches no matrix.
    """
    if sequential not in SEQUENTIAL_CHOICES:
        raise ValueError(f"sequential is one of {', '.join(SEQUENTIAL_CHOICES)}, but {sequential!r} was given")
    modules = dict(model.named_modules())
    reasons = reasons_to_skip(model, modules, include_grouped)
    by_columns = stored_by_columns(modules)
    layers: list[Layer] = []
    owner: dict[int, str] = {}
    embeddings: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.setdefault(id(module.weight), name)
    skipped = [
        packed(name, buffer, modules[name.rpartition(".")[0]])
        for name, buffer in model.named_buffers()
        if is_packed_weight(name, buffer)
    ]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            skipped.append(Skipped(name, (), "has no shape yet: run one batch through the model first", True))
            continue
        if parameter.ndim < 2:
            continue
        module_name, _, parameter_name = name.rpartition(".")
        if module_name not in modules:  # the same module under a second name
            continue
        module = modules[module_name]
        label = module_name if parameter_name == "weight" and module_name else name
        left = parameter_name == "weight" and module_name in reasons
        found = [] if left else layers_of(label, module, parameter_name, modules, by_columns)
        first = embeddings.get(id(parameter)) or owner.setdefault(id(parameter), label)
        if first != label:
            skipped.append(Skipped(label, tuple(parameter.shape), f"tied to {first}"))
            aliases.setdefault(first, []).append(label)
            for part in found:  # an expert, or a group
                if suffix := part.name.removeprefix(label):
                    aliases.setdefault(first + suffix, []).append(part.name)
        elif is_packed(parameter) or quantizer(module, parameter):
            skipped.append(packed(label, parameter, module))
        elif left or (found and module_name in reasons):
            skipped.append(Skipped(label, tuple(parameter.shape), reasons[module_name]))
        elif not found:
            skipped.append(Skipped(label, tuple(parameter.shape), why_no_layer(module, parameter_name)))
        else:
            layers.extend(found)
    for layer in tuple(layers):
        if other := next((name for name in aliases.get(layer.name, ()) if name in reasons), None):
            layers.remove(layer)
            skipped.append(Skipped(layer.name, layer.stored_shape, f"tied to {other}: {reasons[other]}"))
    layers, left_out = _leave_out(layers, skipped, skip, only, aliases)
    return _fitting(Inventory(_units(model, modules, layers, sequential), left_out), pattern)


def _leave_out(
    layers: list[Layer],
    skipped: list[Skipped],
    skip: Sequence[str],
    only: Sequence[str],
    aliases: Mapping[str, list[str]],
) -> tuple[list[Layer], tuple[Skipped, ...]]:
    every = [layer.name for layer in layers] + [other.name for other in skipped]
    refuse_unmatched(skip, every, "skip", "matrix")
    refuse_unmatched(only, every, "only", "matrix")

    def by_user(name: str) -> str | None:
        names = (name, *aliases.get(name, ()))
        for pattern in skip:
            if any(matches(name, pattern, "skip") for name in names):
                return f"skip={pattern!r}"
        if only and not any(matches(name, pattern, "only") for name in names for pattern in only):
            return f"not in only={list(only)}"
        return None

    chosen = [(layer, by_user(layer.name)) for layer in layers]
    kept = [layer for layer, reason in chosen if reason is None]
    left = [Skipped(layer.name, layer.stored_shape, reason, by_user=True) for layer, reason in chosen if reason]
    # What the user named is decided: packed weights among it are no longer in the way.
    decided = [replace(s, unprunable=False, by_user=True) if by_user(s.name) else s for s in skipped]
    return kept, (*decided, *left)


def _fitting(found: Inventory, pattern: Pattern) -> Inventory:
    """Skip the layers that the pattern does not fit; what is a block does not depend on it."""
    misfits = {layer: reason for layer in found.layers if (reason := pattern.why_not(layer.shape[1]))}
    units = [replace(unit, layers=tuple(x for x in unit.layers if x not in misfits)) for unit in found.units]
    skipped = [Skipped(x.name, x.stored_shape, reason, why_not=True) for x, reason in misfits.items()]
    return Inventory(tuple(unit for unit in units if unit.layers), (*found.skipped, *skipped))


def _units(model: nn.Module, modules: dict[str, nn.Module], layers: list[Layer], sequential: str) -> tuple[Unit, ...]:
    if sequential == "none":
        return (Unit("", None, tuple(layers)),) if layers else ()
    blocks = _blocks(modules, layers) if sequential == "block" else {}
    names = {module: name or "weight" for name, module in modules.items()}
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        inside = [name for name in blocks if layer.name.startswith(f"{name}.")]
        # Experts and groups that are one parameter are one module, whose forward can be stopped at.
        members.setdefault(inside[0] if inside else names[layer.module], []).append(layer)
    return tuple(Unit(name, modules.get(name, model), tuple(inner)) for name, inner in members.items())


def _blocks(modules: dict[str, nn.Module], layers: list[Layer]) -> dict[str, nn.Module]:
    """The repeated parts of a model, by name; none lies in another.

    transformers says it by class: what can be gradient-checkpointed. Elsewhere a block is a member of a list or
    sequence that holds at least two layers and no smaller such member (a stage of blocks is not a block).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    counts = dict.fromkeys(modules, 0)
    for layer in {id(layer.module): layer for layer in layers}.values():
        parts = layer.name.split(".")
        for length in range(len(parts)):
            prefix = ".".join(parts[:length])
            if prefix in counts:
                counts[prefix] += 1
    declared = [name for name, m in modules.items() if isinstance(m, GradientCheckpointingLayer) and counts[name]]
    listed = [
        f"{name}.{child}" if name else child
        for name, container in modules.items()
        if isinstance(container, nn.ModuleList | nn.Sequential) and not name.endswith("experts")
        for child, member in container.named_children()
        if not isinstance(member, nn.ModuleList | nn.Sequential)
    ]
    listed = [name for name in listed if counts.get(name, 0) >= 2]
    # Inside a model of transformers its own word counts.
    listed = [
        name for name in listed if not any(name.startswith(f"{d}.") or d.startswith(f"{name}.") for d in declared)
    ]
    candidates = declared + [name for name in listed if name not in declared]
    innermost = [name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)]
    return {name: modules[name] for name in innermost}
