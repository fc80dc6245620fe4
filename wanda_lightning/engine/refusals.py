"""Refuse models and choices that cannot be pruned, before a weight is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.memory import free_memory
from wanda_lightning.common.words import as_gib, counted
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Structured
from wanda_lightning.models import Inventory, Layer, SkipReason
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.models.refuse_model import refuse_no_values
from wanda_lightning.parallel import Processes, local


def refuse_nothing_to_prune(config: PruningConfig, inventory: Inventory) -> None:
    """Refuse matrices that the user must decide about, and a model without any layer to prune."""
    undecided = [m for m in inventory.skipped if m.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)]
    if undecided:
        first = undecided[0]
        raise UserError(
            f"skip must name {counted(len(undecided), 'matrix', 'matrices')} that cannot be pruned in place, "
            f"{first.name} first: {first.detail}. Load the model unquantized (float32, bfloat16 or float16), or leave "
            f"what cannot be pruned dense with skip=['{first.name}']."
        )
    if inventory.layers:
        return
    if unfit := inventory.skipped_for(SkipReason.PATTERN):
        raise UserError(
            f"{config.shown('pattern')} fits none of the {counted(len(unfit), 'layer')} that would be pruned; the "
            f"largest is {unfit[0].name}: {unfit[0].detail}. Use an N:M whose M divides the input widths, or "
            "pattern='unstructured'."
        )
    asked = [m for m in inventory.skipped if config.only and m.reason is not SkipReason.USER]
    reasons = "; ".join(dict.fromkeys(f"{m.name}: {m.detail}" for m in (asked or inventory.skipped)[:5]))
    which = f"only={list(config.only)} names" if config.only else "model has"
    raise UserError(
        f"{which} nothing to prune ({reasons or 'there are no weight matrices'}). Give a model with linear or "
        "convolution layers, or choose others with skip= and only=."
    )


def refuse_unprunable(layers: Iterable[Layer]) -> None:
    """Refuse weights without values, weights that cannot be written, NaN and infinity."""
    for layer in layers:
        refuse_no_values(layer)
        weight = layer.weight
        if layer.parameter.is_inference():
            raise UserError(
                f"model must have weights that can change, but {layer.name} was created under torch.inference_mode(). "
                "Build or load the model outside of it."
            )
        stored = local(layer.parameter.detach())
        if any(step == 0 and size > 1 for step, size in zip(stored.stride(), stored.shape, strict=True)):
            raise UserError(
                f"model must store each weight by itself, but {layer.name} was made by expand() and repeats the same "
                "numbers. Replace it by nn.Parameter(weight.clone())."
            )
        # The sum takes one fast pass. It may overflow, so only the slow check of each weight decides.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise UserError(
                f"model must have finite weights, but {layer.name} has weights that are NaN or infinite. Check the "
                "checkpoint. If its weights overflowed in the conversion to float16, load it in float32 or bfloat16."
            )


def refuse_rounding(config: PruningConfig, widths: Mapping[str, int]) -> None:
    """Refuse a structured pattern that, rounded, could remove no unit of any layer, or would remove all of them.

    `widths` holds the number of units that each layer reads, or at most reads.
    """
    pattern = config.pattern
    if not isinstance(pattern, Structured) or not widths:
        return
    name, widest = max(widths.items(), key=lambda item: item[1])
    if widest <= pattern.multiple_of:
        raise UserError(
            f"multiple_of={pattern.multiple_of} of {config.shown('pattern')} leaves no unit to remove: the widest "
            f"layer, {name}, reads {widest} hidden units. Choose a smaller one, such as "
            f"Structured(multiple_of={max(1, widest // 8)})."
        )
    if pattern.multiples(widest, config.sparsity) < 1:
        raise UserError(
            f"sparsity={config.sparsity:g} would remove all {widest} hidden units that {name} reads, in multiples of "
            f"{pattern.multiple_of}. Choose a lower sparsity, or a smaller multiple_of."
        )


_GRAMS_AT_ONCE = 4  # the sum, its dampened copy, the Cholesky factor and the inverse


def refuse_too_wide(config: PruningConfig, inventory: Inventory) -> None:
    """Refuse Gram matrices (d_in, d_in) that certainly do not fit in memory."""
    if "gram" not in config.needs:
        return
    widest = max(inventory.layers, key=lambda layer: layer.shape[1])
    largest = widest.shape[1] ** 2 * max(4, widest.weight.element_size())
    # Until a unit is pruned, memory holds at least one matrix for each input width in each block, and for each expert.
    widths: dict[str, set[tuple[str, int]]] = {}
    for layer in inventory.layers:
        unit = layer.name if config.sequential == "layer" else inventory.blocks[layer.name]
        widths.setdefault(unit, set()).add((layer.siblings and layer.name, layer.shape[1]))
    of_blocks = [4 * sum(width**2 for _, width in block) for block in widths.values()]
    held = sum(of_blocks) if config.sequential == "none" else max(of_blocks)
    needed, free = max(_GRAMS_AT_ONCE * largest, held), free_memory(widest.weight.device)
    if needed > free:
        raise UserError(
            f"{config.data_reader} needs at least {as_gib(needed)} for Gram matrices, the largest for "
            f"{widest.name} with {widest.shape[1]} inputs, but only {as_gib(free)} are free on "
            f"{widest.weight.device}. Leave wide layers dense with skip=['{widest.name}'], use criterion='wanda' with "
            "solver='zero_out', or use sequential='layer'."
        )


def refuse_sharding(config: PruningConfig, model: nn.Module, inventory: Inventory, processes: Processes) -> None:
    """Refuse layers that are sharded by FSDP2 or tensor parallelism in a way that pruning does not support."""
    managers = [name for name, module in named_modules(model).items() if isinstance(module, FSDPModule)]
    for layer in inventory.layers:
        _refuse_sharded(config, managers, inventory.blocks[layer.name], layer, processes)


def _refuse_sharded(
    config: PruningConfig, managers: Sequence[str], block: str, layer: Layer, processes: Processes
) -> None:
    weight, name = layer.parameter, layer.name
    managed = getattr(layer.module, "_is_fsdp_managed_module", False)
    if isinstance(weight, DTensor) and not managed:
        raise UserError(
            f"model must be sharded by fully_shard or not at all, but the weight of {name} is sharded by "
            f"{weight.placements}: tensor parallelism is not supported. Prune the model before parallelize_module, or "
            "load it without tp_plan=."
        )
    if not managed:
        return
    managers = [inside for inside in managers if f"{name}.".startswith(_prefix(inside))]
    if not managers:
        raise UserError(
            f"model must be sharded itself, but a module around it manages the weight of {name}. Apply fully_shard to "
            "the model and to its blocks; FSDP1 is not supported."
        )
    if not isinstance(weight, DTensor):  # fully_shard(ignored_params=...): each process has all of it
        return
    _refuse_layout(layer, weight, processes)
    stops_at_units = bool(config.unit_needs) and config.sequential != "none"
    if stops_at_units and not f"{managers[-1]}.".startswith(_prefix(block)):
        raise UserError(
            f"{config.shown('sequential')} stops in {block}, but fully_shard manages {name} as a part of "
            f"{managers[-1] or 'the whole model'}. Apply fully_shard to {block} too, leave it dense with "
            f"skip=['{block}'], or use sequential='none'."
        )


def _refuse_layout(layer: Layer, weight: DTensor, processes: Processes) -> None:
    """Refuse a layer unless each process holds another part of it."""
    name = layer.name
    if weight.device_mesh.size() != processes.world_size:
        raise UserError(
            f"processes must be those that hold the model, but the weight of {name} is sharded across "
            f"{weight.device_mesh.size()} processes and {processes.world_size} prune. Prune inside a Trainer with "
            "ModelParallelStrategy (WandaPrune does), or call prune_as(..., processes=Processes(group))."
        )
    if len(weight.placements) != 1 or type(weight.placements[0]) is not Shard:
        raise UserError(
            f"model must be sharded over one group of processes, but the weight of {name} is sharded by "
            f"{weight.placements}. Use fully_shard with a mesh of one dimension, or leave the layer dense with "
            f"skip=['{name}']."
        )


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
