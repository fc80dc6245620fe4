"""What cannot be pruned as asked, known before a weight is written."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import Allocation
from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.solvers import Reconstruct
from wanda_lightning.models import Inventory, Layer, Unit, free_memory
from wanda_lightning.parallel import Processes


def refuse_unprunable(config: PruningConfig, found: Inventory) -> None:
    """Everything that can be known to fail, before a weight is written."""
    packed = [matrix for matrix in found.skipped if matrix.unprunable]
    if packed:
        raise ValueError(
            f"{len(packed)} matrices cannot be pruned in place, {packed[0].name} first: {packed[0].reason}. "
            "Load the model unquantised (float32, bfloat16 or float16), "
            f"or leave them out with skip=['{packed[0].name}']."
        )
    if not found.layers and (misfits := found.misfits):
        raise ValueError(
            f"{config.pattern} fits none of the {len(misfits)} layers that would be pruned, {misfits[0].name} largest: "
            f"{misfits[0].reason}. Use an N:M whose M divides the input widths, or pattern='unstructured'."
        )
    if not found.layers:
        reasons = "; ".join(dict.fromkeys(f"{matrix.name}: {matrix.reason}" for matrix in found.skipped[:5]))
        raise ValueError(
            f"the model has nothing to prune ({reasons or 'it has no weight matrices'}). "
            "Give a model with linear or convolution layers, or choose more with skip= and only=."
        )
    for layer in found.layers:
        refuse_spread_experts(layer)
        weight = layer.read()
        if weight.is_meta:
            raise ValueError(f"{layer.name} is on the meta device and has no values: load the weights before pruning")
        if weight.is_inference():
            raise ValueError(
                f"the weight of {layer.name} was made under torch.inference_mode() and cannot be changed: "
                "build or load the model outside of it"
            )
        # One fast pass; only a sum that overflows or holds NaN needs the look at each weight.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise ValueError(f"the weight of {layer.name} holds NaN or infinity: check the checkpoint")


def refuse_spread_experts(layer: Layer) -> None:
    """Experts of which each process holds some."""
    if layer.expert is not None and isinstance(layer.parameter, DTensor):
        module = layer.siblings.removesuffix(".*").removesuffix(f".{layer.parameter_name}").rpartition(".")[2]
        raise ValueError(
            f"the experts {layer.siblings} are spread over processes, of which none holds all. Prune before sharding "
            f"(devices=1, or DDPStrategy), or leave them dense with skip=['*.{module}']."
        )


def refuse_training_together(config: PruningConfig, processes: Processes) -> None:
    """What learns from the batches of its own process alone."""
    if isinstance(config.solver, Reconstruct) and processes.world_size > 1:
        raise ValueError(
            f"Reconstruct trains in one process, but {processes.world_size} prune together: prune with devices=1, or "
            "use another solver such as ADMM()"
        )


_GRAMS_AT_ONCE = 4  # one that is summed, its dampened copy, the factor and its inverse


def refuse_too_wide(config: PruningConfig, found: Inventory, model: nn.Module) -> None:
    """A Gram matrix has the square of the input width; what certainly does not fit is not begun."""
    widest = max(found.layers, key=lambda layer: layer.shape[1])
    wide = widest.shape[1] ** 2 * max(4, widest.weight.element_size())
    # Until the weights of a unit are chosen, of every block in it at least one for each of its widths is held, and of
    # each expert its own.
    blocks = config.find_layers(model, "block").units if config.sequential == "none" else found.units
    grams = [{(layer.siblings and layer.name, layer.shape[1]) for layer in block.layers} for block in blocks]
    at_blocks = [4 * sum(width**2 for _, width in of_block) for of_block in grams]
    held = sum(at_blocks) if config.sequential == "none" else max(at_blocks)
    needed, free = max(_GRAMS_AT_ONCE * wide, held), free_memory(widest.weight.device)
    if needed > free:
        raise ValueError(
            f"{config.reader} needs at least {needed / _GIB:.1f} GiB for Gram matrices, the widest of {widest.name} "
            f"with {widest.shape[1]} inputs, but {free / _GIB:.1f} GiB are free on {widest.weight.device}: leave wide "
            f"layers dense with skip=['{widest.name}'], use criterion='wanda' with solver='zero_out', or "
            "sequential='layer' where it is not"
        )


_GIB = 2**30


def refuse_sharding(config: PruningConfig, model: nn.Module, unit: Unit, layer: Layer, processes: Processes) -> None:
    """What cannot be pruned because of how FSDP2 or tensor parallelism spreads its weight over processes."""
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
    outer = {inside: module for inside, module in model.named_modules() if f"{name}.".startswith(_prefix(inside))}
    managers = [inside for inside, module in outer.items() if isinstance(module, FSDPModule)]
    if not managers:
        raise ValueError(
            f"the weight of {name} is managed from outside of what is pruned. Apply fully_shard to the model itself "
            "and to its blocks, not to a module around it; FSDP1 is not supported."
        )
    if not isinstance(weight, DTensor):  # fully_shard(ignored_params=...): each process has all of it
        return
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
    if cast(Pattern, config.pattern).spans_rows:
        raise ValueError(
            f"{config.pattern} compares the rows of {name} with each other, but they are spread over "
            f"{processes.world_size} processes. Use pattern='unstructured' or N:M, which choose within rows, or prune "
            "before sharding (devices=1)."
        )
    if cast(Criterion, config.criterion).spans_rows or cast(Allocation, config.allocation).reads_weights:
        choice = config.criterion if cast(Criterion, config.criterion).spans_rows else config.allocation
        raise ValueError(
            f"{choice} reads all rows of {name} together, but they are spread over {processes.world_size} processes. "
            "Use Wanda() or Magnitude() with Uniform(), which read single rows, or prune before sharding (devices=1)."
        )
    at_units = bool(config.unit_needs) and config.sequential != "none"
    if at_units and not f"{managers[-1]}.".startswith(_prefix(unit.name)):
        raise ValueError(
            f"sequential={config.sequential!r} stops at {unit.name}, but fully_shard manages {name} as a part of "
            f"{managers[-1] or 'the whole model'}. Apply fully_shard also to {unit.name}, leave it dense with "
            f"skip=['{unit.name}'], or use sequential='none'."
        )


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
