"""What cannot be pruned as asked, refused before a weight is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import psutil
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from wanda_lightning.config import PruningConfig
from wanda_lightning.models import Inventory, Layer, SkippedMatrix, SkipReason, Unit
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.parallel import Processes


def refuse_nothing_to_prune(config: PruningConfig, inventory: Inventory) -> None:
    """Refuse matrices that the user must decide about, and a model without any layer to prune."""
    undecided = [m for m in inventory.skipped if m.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)]
    if undecided:
        first = undecided[0]
        raise ValueError(
            f"skip does not name {_counted(undecided, 'matrix', 'matrices')} that cannot be pruned in place, "
            f"{first.name} first: {first.detail}. Load the model unquantized (float32, bfloat16 or float16), or leave "
            f"what cannot be pruned dense with skip=['{first.name}']."
        )
    if inventory.layers:
        return
    if unfit := inventory.skipped_for(SkipReason.PATTERN):
        raise ValueError(
            f"pattern={config.pattern} fits none of the {_counted(unfit, 'layer')} that would be pruned; the largest "
            f"is {unfit[0].name}: {unfit[0].detail}. Use an N:M whose M divides the input widths, or "
            "pattern='unstructured'."
        )
    asked = [m for m in inventory.skipped if config.only and m.reason is not SkipReason.USER]
    reasons = "; ".join(dict.fromkeys(f"{m.name}: {m.detail}" for m in (asked or inventory.skipped)[:5]))
    which = f"only={list(config.only)} names" if config.only else "the model has"
    raise ValueError(
        f"{which} nothing to prune ({reasons or 'there are no weight matrices'}). Give a model with linear or "
        "convolution layers, or choose others with skip= and only=."
    )


def refuse_unprunable(layers: Iterable[Layer]) -> None:
    """Refuse weights without values, weights that cannot be written, NaN and infinity."""
    for layer in layers:
        refuse_spread_experts(layer)
        weight = layer.weight
        if weight.is_meta:
            raise ValueError(f"{layer.name} is on the meta device and has no values. Load the weights before pruning.")
        if layer.parameter.is_inference():
            raise ValueError(
                f"{layer.name} was created under torch.inference_mode(), so its weight cannot be changed. Build or "
                "load the model outside of it."
            )
        # One fast pass; only a sum that overflows or holds NaN needs a look at each weight.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise ValueError(
                f"{layer.name} has weights that are NaN or infinite. Check the checkpoint; float16 weights may have "
                "overflowed when they were converted: load it in float32 or bfloat16."
            )


def _counted(matrices: Sequence[SkippedMatrix], one: str, many: str = "layers") -> str:
    return f"{len(matrices)} {one if len(matrices) == 1 else many}"


def refuse_spread_experts(layer: Layer) -> None:
    """Refuse experts that are spread over processes: no process holds all of them."""
    if layer.expert is not None and isinstance(layer.parameter, DTensor):
        module = layer.siblings.removesuffix(".*").removesuffix(f".{layer.parameter_name}").rpartition(".")[2]
        raise ValueError(
            f"the experts {layer.siblings} are spread over processes, of which none holds all. Prune before sharding "
            f"(devices=1, or DDPStrategy), or leave them dense with skip=['*.{module}']."
        )


def free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


_GRAMS_AT_ONCE = 4  # the one that is summed, its dampened copy, the factor and its inverse
_GIB = 2**30


def refuse_too_wide(config: PruningConfig, inventory: Inventory) -> None:
    """Refuse Gram matrices that certainly do not fit in memory: each has the square of an input width."""
    if "gram" not in config.needs:
        return
    widest = max(inventory.layers, key=lambda layer: layer.shape[1])
    largest = widest.shape[1] ** 2 * max(4, widest.weight.element_size())
    # Until the weights of a unit are chosen, at least one matrix is held for each input width in each of its blocks,
    # and one for each expert.
    widths: dict[str, set[tuple[str, int]]] = {}
    for layer in inventory.layers:
        unit = layer.name if config.sequential == "layer" else inventory.blocks[layer.name]
        widths.setdefault(unit, set()).add((layer.siblings and layer.name, layer.shape[1]))
    of_blocks = [4 * sum(width**2 for _, width in block) for block in widths.values()]
    held = sum(of_blocks) if config.sequential == "none" else max(of_blocks)
    needed, free = max(_GRAMS_AT_ONCE * largest, held), free_memory(widest.weight.device)
    if needed > free:
        raise ValueError(
            f"{config.data_reader} needs at least {needed / _GIB:.1f} GiB for Gram matrices, the largest for "
            f"{widest.name} with {widest.shape[1]} inputs, but {free / _GIB:.1f} GiB are free on "
            f"{widest.weight.device}. Leave wide layers dense with skip=['{widest.name}'], use criterion='wanda' with "
            "solver='zero_out', or use sequential='layer'."
        )


def refuse_sharding(config: PruningConfig, model: nn.Module, unit: Unit, layer: Layer, processes: Processes) -> None:
    """Refuse a layer that FSDP2 or tensor parallelism spreads over processes in a way that cannot be pruned."""
    weight, name = layer.parameter, layer.name
    managed = getattr(layer.module, "_is_fsdp_managed_module", False)
    if isinstance(weight, DTensor) and not managed:
        raise ValueError(
            f"the weight of {name} is spread over processes by {weight.placements}, but not by fully_shard: tensor "
            "parallelism is not supported. Prune the model before parallelize_module, or load it without tp_plan=, and "
            "spread the pruned model."
        )
    if not managed:
        return
    outer = {
        inside: module for inside, module in named_modules(model).items() if f"{name}.".startswith(_prefix(inside))
    }
    managers = [inside for inside, module in outer.items() if isinstance(module, FSDPModule)]
    if not managers:
        raise ValueError(
            f"the weight of {name} is managed from outside of what is pruned. Apply fully_shard to the model itself "
            "and to its blocks, not to a module around it; FSDP1 is not supported."
        )
    if not isinstance(weight, DTensor):  # fully_shard(ignored_params=...): each process has all of it
        return
    _refuse_layout(layer, weight, processes)
    _refuse_choices_across_rows(config, layer, processes)
    stops_at_units = bool(config.unit_needs) and config.sequential != "none"
    if stops_at_units and not f"{managers[-1]}.".startswith(_prefix(unit.name)):
        raise ValueError(
            f"sequential={config.sequential!r} stops at {unit.name}, but fully_shard manages {name} as a part of "
            f"{managers[-1] or 'the whole model'}. Apply fully_shard also to {unit.name}, leave it dense with "
            f"skip=['{unit.name}'], or use sequential='none'."
        )


def _refuse_layout(layer: Layer, weight: DTensor, processes: Processes) -> None:
    """Each process must hold whole rows of the matrix."""
    name = layer.name
    if weight.device_mesh.size() != processes.world_size:
        raise ValueError(
            f"the weight of {name} is spread over {weight.device_mesh.size()} processes, but {processes.world_size} "
            "prune. Prune inside a Trainer with ModelParallelStrategy (WandaPrune does), or give prune_as(...) the "
            "processes=Processes(group)."
        )
    if len(weight.placements) != 1 or type(weight.placements[0]) is not Shard or weight.placements[0].dim != 0:
        raise ValueError(
            f"the weight of {name} is spread over processes by {weight.placements}, but each must hold whole rows: "
            "use fully_shard as it is by default (on a mesh of one dimension, without shard_placement_fn), or leave "
            f"it dense with skip=['{name}']."
        )
    if layer.size < weight.numel():
        raise ValueError(
            f"{name} is one group of a convolution, and fully_shard leaves no process whole groups. Prune before "
            "sharding (devices=1), or without include_grouped=True."
        )
    if not layer.kind.rows_first:
        raise ValueError(
            f"the weight of {name}, a {type(layer.module).__name__}, is stored by columns, and fully_shard leaves no "
            f"process whole rows. Prune before sharding (devices=1), or leave it dense with skip=['{name}']."
        )


def _refuse_choices_across_rows(config: PruningConfig, layer: Layer, processes: Processes) -> None:
    """Each process must be able to prune its rows without the others."""
    name = layer.name
    if config.pattern.spans_rows:
        raise ValueError(
            f"{config.pattern} compares the rows of {name} with each other, but they are spread over "
            f"{processes.world_size} processes. Use pattern='unstructured' or N:M, which choose within rows, or prune "
            "before sharding (devices=1)."
        )
    if config.criterion.spans_rows or config.allocation.reads_weights:
        choice = config.criterion if config.criterion.spans_rows else config.allocation
        raise ValueError(
            f"{choice} reads all rows of {name} together, but they are spread over {processes.world_size} processes. "
            "Use Wanda() or Magnitude() with Uniform(), which read single rows, or prune before sharding (devices=1)."
        )


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
