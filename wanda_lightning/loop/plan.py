"""The plan of a pruning: the layers, their stops and their sparsities, found before any weight changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor
from torch.nn import Module

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import DenseLayer
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.statistics import GradientStatistics, Inputs, InputStatistics
from wanda_lightning.models import (
    Inventory,
    Layer,
    ReadWeight,
    SkipReason,
    Stop,
    Stops,
    find_layers,
    group_by_stop,
    reads_images,
    tied_tensors,
)
from wanda_lightning.models.layers import all_finite, refuse_no_values
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, is_sharded


@dataclass(frozen=True)
class DenseStatistics:
    """Statistics of the dense model that allocations and patterns read, by layer."""

    inputs: Inputs = field(default_factory=dict)
    gradients: Mapping[str, GradientStatistics] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A model with its layers grouped into stops, and the choices and processes that prune it."""

    config: PruningConfig  # for this model, see `config_for`
    model: Module
    processes: Processes
    inventory: Inventory
    preset: str = ""  # the name for these choices, before the model decided about any

    @property
    def stops(self) -> Stops:
        """The stops at which the calibration batches wait."""
        return self.inventory.stops

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune."""
        return self.inventory.layers

    @property
    def whole_model(self) -> Stop:
        """All layers as one stop."""
        return Stop("", None, self.layers)

    @cached_property
    def blocks_and_layers(self) -> Stops:
        """One stop for each block that holds layers, and for each layer outside of all blocks."""
        return group_by_stop(self.layers, self.inventory.blocks, self.model)

    @cached_property
    def block_stops(self) -> Stops:
        """One stop for each block that holds layers; none contains another."""
        stops = self.blocks_and_layers
        return tuple(stop for stop in stops if stop.is_block and stop.module is not self.model)

    @cached_property
    def blocks(self) -> tuple[Module, ...]:
        """The modules of `block_stops`."""
        return tuple(stop.module for stop in self.block_stops if stop.module)

    @cached_property
    def _tied(self) -> set[tuple[Module, str]]:
        return tied_tensors(self.model)

    def fitted_bias(self, layer: Layer) -> Tensor | None:
        """Return the bias of a layer if the solver fits it, too; not one that is shared."""
        if not self.config.solver.intercept or (layer.module, layer.bias_name) in self._tied:
            return None
        return layer.bias

    def with_choices(self, config: PruningConfig) -> Plan:
        """Return the plan for other choices that concern the same layers, such as a lower sparsity."""
        return replace(self, config=config_for(config, self.model), preset=config.preset)

    @property
    def is_one_pass(self) -> bool:
        """Whether one pass through the dense model collects all statistics, including those for the allocation."""
        return self.config.sequential == "none" and bool(self.config.needs)

    @property
    def runs_dense(self) -> bool:
        """Whether batches run through the whole dense model, for its statistics or gradients, before it is pruned."""
        config = self.config
        return self.is_one_pass or bool(config.allocation.needs) or config.reads_gradients

    @property
    def observed(self) -> frozenset[str]:
        """The statistics that are collected before the layers of a stop are pruned."""
        return self.config.needs if self.is_one_pass else self.config.stop_needs

    def dense_layers(
        self,
        layers: Iterable[Layer],
        dense: DenseStatistics = DenseStatistics(),
        read: ReadWeight = Layer.read,
    ) -> list[DenseLayer]:
        """Describe layers to an allocation."""
        return [
            DenseLayer(
                layer.name,
                self.inventory.blocks[layer.name],
                layer.size,
                self.config.pattern.sparsity_steps(*layer.shape),
                partial(read, layer),
                dense.inputs.get(layer.name, InputStatistics()),
                dense.gradients.get(layer.name),
            )
            for layer in layers
        ]


def config_for(config: PruningConfig, model: Module) -> PruningConfig:
    """Return the choices for one model, which decides about `sequential`, `weigh_rows=None` and `blocks=None`.

    `sequential="auto"` and `"one_pass"` mean `"none"` for image models. For others the pattern decides, see
    `Pattern.sequential`; but if a recovery trains blocks, `"block"` replaces a `"layer"` that the user did not ask for.
    """
    is_image = reads_images(model)
    pattern = config.pattern
    recovery = config.recovery.for_model(
        is_image and pattern.removes == "weights", config.sequential
    )
    if isinstance(pattern, Unstructured) and pattern.weigh_rows is None:
        pattern = replace(pattern, weigh_rows=not is_image)

    is_open = config.sequential in ("auto", "one_pass")
    sequential = pattern.sequential(config.sequential)
    if is_open and is_image:
        sequential = "none"
    elif is_open and sequential == "layer" and recovery.trains_blocks:
        sequential = "block"
    return replace(config, pattern=pattern, recovery=recovery, sequential=sequential)


def make_plan(
    config: PruningConfig,
    model: Module,
    processes: Processes = SINGLE_PROCESS,
    by_block: bool = False,
) -> Plan:
    """Find what will be pruned, without reading or changing the weights.

    An error in one of the processes ends all of them. With `by_block`, blocks are loaded one at a time.

    Raises:
        ValueError: If the model cannot be pruned as asked.
    """
    if is_sharded(model):
        raise UserError(
            "model must be whole in each process, but FSDP or tensor parallelism shards it. Prune it before it is "
            "sharded: with prune, with DDP, or, if it is larger than memory, with prune_from_disk. Then train it with "
            "KeepZeros, which keeps the zeros of sharded models."
        )
    preset = config.preset
    config = config_for(config, model)
    # Blocks are loaded or trained one at a time, also to be pruned with statistics of the dense model.
    by_block = by_block or config.recovery.trains_blocks
    stops = "block" if config.sequential == "none" and by_block else config.sequential
    with processes.fail_together():
        inventory = find_layers(model, stops, config.skip, config.only, config.pattern)
        plan = Plan(config, model, processes, inventory, preset=preset)
        refuse_nothing_to_prune(config, inventory)
        widths = {layer.name: layer.width for layer in inventory.layers}
        config.pattern.check_widths(widths, config.sparsity, config.shown("pattern"))
        config.allocation.check(plan.dense_layers(plan.layers), config.sparsity)
    return plan


def refuse_nothing_to_prune(config: PruningConfig, inventory: Inventory) -> None:
    """Refuse matrices that the user must decide about, and a model without any layer to prune."""
    undecided = [
        matrix
        for matrix in inventory.skipped
        if matrix.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)
    ]
    if undecided:
        first = undecided[0]
        raise UserError(
            f"skip must name {quantity(len(undecided), 'matrix', 'matrices')} that cannot be pruned in place, "
            f"{first.name} first: {first.detail}. Load the model unquantized (float32, bfloat16 or float16), or leave "
            f"what cannot be pruned dense with skip=['{first.name}']."
        )
    if inventory.layers:
        return

    # Explain by the matrices that the user asked for, if there are any.
    unfit = inventory.skipped_for(SkipReason.PATTERN)
    asked_for = [m for m in inventory.skipped if config.only and m.reason is not SkipReason.USER]
    explained = unfit or asked_for or inventory.skipped
    reasons = dict.fromkeys(f"{matrix.name}: {matrix.detail}" for matrix in explained[:5])

    if unfit:
        number = quantity(len(unfit), "layer")
        subject = f"{config.shown('pattern')} fits none of the {number}: it leaves"
    else:
        subject = "model has"
    raise UserError(
        f"{subject} nothing to prune ({'; '.join(reasons) or 'there are no weight matrices'}). Give a model with "
        "linear or convolution layers, choose others with skip= and only=, or prune with pattern='unstructured'."
    )


def refuse_unprunable(layers: Iterable[Layer]) -> None:
    """Refuse weights without values, weights that cannot be written, NaN and infinity."""
    for layer in layers:
        refuse_no_values(layer)
        if layer.parameter.is_inference():
            problem = (
                "was created under torch.inference_mode() and cannot change. Build or load the model "
                "outside of it."
            )
        elif not all_finite(layer.weight):
            problem = (
                "has weights that are NaN or infinite. Check the checkpoint. If its weights overflowed in the "
                "conversion to float16, load it in float32 or bfloat16."
            )
        else:
            continue
        raise UserError(
            f"model must have finite weights that can be written, but {layer.name} {problem}"
        )
