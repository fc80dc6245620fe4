"""Refuse models and choices that cannot be pruned, before a weight is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import counted
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Structured
from wanda_lightning.models import Inventory, Layer, SkipReason
from wanda_lightning.models.layers import refuse_no_values
from wanda_lightning.models.module_names import named_modules
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
    unfit = inventory.skipped_for(SkipReason.PATTERN)
    asked = [m for m in inventory.skipped if config.only and m.reason is not SkipReason.USER]
    reasons = "; ".join(dict.fromkeys(f"{m.name}: {m.detail}" for m in (unfit or asked or inventory.skipped)[:5]))
    which = f"only={list(config.only)} names" if config.only else "model has"
    if unfit:
        which = f"{config.shown('pattern')} fits none of the {counted(len(unfit), 'layer')}: it leaves"
    raise UserError(
        f"{which} nothing to prune ({reasons or 'there are no weight matrices'}). Give a model with linear or "
        "convolution layers, choose others with skip= and only=, or use pattern='unstructured'."
    )


def _repeats(layer: Layer) -> bool:
    stored = local(layer.parameter.detach())
    return any(step == 0 and size > 1 for step, size in zip(stored.stride(), stored.shape, strict=True))


def _is_not_finite(layer: Layer) -> bool:
    # The sum takes one fast pass. It may overflow, so only the slow check of each weight decides.
    return not layer.weight.sum().isfinite() and not layer.weight.isfinite().all()


_WEIGHTS: Sequence[tuple[Callable[[Layer], bool], str]] = (
    (
        lambda layer: layer.parameter.is_inference(),
        "was created under torch.inference_mode() and cannot change. Build or load the model outside of it.",
    ),
    (_repeats, "was made by expand() and repeats the same numbers. Replace it by nn.Parameter(weight.clone())."),
    (
        _is_not_finite,
        "has weights that are NaN or infinite. Check the checkpoint. If its weights overflowed in the conversion to "
        "float16, load it in float32 or bfloat16.",
    ),
)


def refuse_unprunable(layers: Iterable[Layer]) -> None:
    """Refuse weights without values, weights that cannot be written, NaN and infinity."""
    for layer in layers:
        refuse_no_values(layer)
        for is_wrong, found in _WEIGHTS:
            if is_wrong(layer):
                raise UserError(f"model must have finite weights that can be written, but {layer.name} {found}")


def refuse_rounding(config: PruningConfig, widths: Mapping[str, int]) -> None:
    """Refuse a structured pattern that, rounded, could remove no unit of any layer, or would remove all of them.

    `widths` holds the number of units that each layer reads, or at most reads.
    """
    pattern = config.pattern
    if not isinstance(pattern, Structured) or not widths:
        return
    name, widest = max(widths.items(), key=lambda item: item[1])
    kept, multiple = pattern.multiples(widest, config.sparsity), pattern.multiple_of
    for is_wrong, found in (
        (widest <= multiple, f"multiple_of={multiple} of {config.shown('pattern')} leaves no unit to remove: "),
        (kept < 1, f"sparsity={config.sparsity:g} would remove all {widest} hidden units: "),
    ):
        if is_wrong:
            raise UserError(
                f"{found}the widest layer, {name}, reads {widest}, in multiples of {multiple}. "
                "Choose another sparsity, or a smaller multiple_of."
            )


def refuse_sharding(config: PruningConfig, model: nn.Module, inventory: Inventory, processes: Processes) -> None:
    """Refuse layers that are sharded by FSDP2 or tensor parallelism in a way that pruning does not support."""
    managers = [name for name, module in named_modules(model).items() if isinstance(module, FSDPModule)]
    for layer in inventory.layers:
        for is_wrong, found in _shardings(config, managers, inventory.blocks[layer.name], layer, processes):
            if is_wrong:
                raise UserError(f"model must be sharded by fully_shard, over the processes that prune, but {found}")


def _shardings(
    config: PruningConfig, managers: Sequence[str], block: str, layer: Layer, processes: Processes
) -> Iterable[tuple[bool, str]]:
    """Yield what can be wrong with the shards of a layer: whether it is, what was found, and what to do."""
    weight, name = layer.parameter, layer.name
    is_managed = getattr(layer.module, "_is_fsdp_managed_module", False)
    around = [inside for inside in managers if f"{name}.".startswith(_prefix(inside))]
    if is_managed:
        yield (
            not around,
            f"a module around it manages the weight of {name}. Apply fully_shard to the model and to its blocks; FSDP1 "
            "is not supported.",
        )
    if not isinstance(weight, DTensor):  # fully_shard(ignored_params=...): each process has all of it
        return
    yield (
        not is_managed,
        f"the weight of {name} is sharded by {weight.placements}: tensor parallelism is not supported. Prune the model "
        "before parallelize_module, or load it without tp_plan=.",
    )
    yield (
        weight.device_mesh.size() != processes.world_size,
        f"the weight of {name} is sharded across {weight.device_mesh.size()} processes and {processes.world_size} "
        "prune. Prune inside a Trainer with ModelParallelStrategy (WandaPrune does), or call "
        "prune_as(..., processes=Processes(group)).",
    )
    yield (
        len(weight.placements) != 1 or type(weight.placements[0]) is not Shard,
        f"the weight of {name} is sharded by {weight.placements}, not over one group of processes. Use fully_shard "
        f"with a mesh of one dimension, or leave the layer dense with skip=['{name}'].",
    )
    stop = name if config.sequential == "layer" else block
    stops_there = bool(config.unit_needs) and config.sequential != "none"
    yield (
        stops_there and not f"{around[-1]}.".startswith(_prefix(stop)),
        f"{config.shown('sequential')} stops at {stop}, and fully_shard manages {name} as a part of "
        f"{around[-1] or 'the whole model'}. Apply fully_shard to {stop} too, leave it dense with skip=['{stop}'], "
        "or use sequential='block' or 'none'.",
    )


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
