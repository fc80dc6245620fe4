"""The plan of a pruning: the layers, their units and their sparsities, found before any weight changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from wanda_lightning.common.checks import shown
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import DenseLayer, UnitLayer
from wanda_lightning.core.patterns import Structured, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.core.types import RowWeights
from wanda_lightning.engine.refusals import (
    refuse_nothing_to_prune,
    refuse_rounding,
    refuse_sharding,
    refuse_unprunable,
)
from wanda_lightning.engine.sharded_layers import WholeMatrices
from wanda_lightning.models import Inventory, Layer, RemovableUnits, Unit, find_layers, reads_images, tied_tensors
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, is_sharded, reshard

Selections = Mapping[str, Selection]  # by layer


@dataclass(frozen=True)
class Plan:
    """A model with its layers grouped into units, and the choices and processes that prune it."""

    config: PruningConfig  # for this model, see `config_for`
    model: nn.Module
    processes: Processes
    inventory: Inventory
    # The hidden units to prune, by the layer that reads them, if whole units are pruned; the layers are these readers.
    coupled: Mapping[str, RemovableUnits] = field(default_factory=dict)
    preset: str = ""  # the name for these choices, before the model decided about any

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units at which the calibration batches stop."""
        return self.inventory.units

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune."""
        return self.inventory.layers

    @property
    def whole_model(self) -> Unit:
        """All layers as one unit."""
        return Unit("", None, self.layers)

    @cached_property
    def parts(self) -> tuple[Unit, ...]:
        """One unit for each block that holds layers, and for each layer outside of all blocks."""
        modules, members = named_modules(self.model), dict[str, list[Layer]]()
        for layer in self.layers:
            members.setdefault(self.inventory.blocks[layer.name], []).append(layer)
        return tuple(Unit(name, modules.get(name, self.model), tuple(inside)) for name, inside in members.items())

    @cached_property
    def block_units(self) -> tuple[Unit, ...]:
        """One unit for each block that holds layers; none contains another."""
        own = {self.model, *(layer.module for layer in self.layers)}
        return tuple(unit for unit in self.parts if unit.module not in own)

    @cached_property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The modules of `block_units`."""
        return tuple(unit.module for unit in self.block_units if unit.module)

    @cached_property
    def _tied(self) -> set[tuple[nn.Module, str]]:
        return tied_tensors(self.model)

    def fitted_bias(self, layer: Layer) -> Tensor | None:
        """Return the bias of a layer if the solver fits it, too; not one that is shared."""
        if not self.config.solver.intercept:
            return None
        return None if (layer.module, layer.bias_name) in self._tied else layer.bias

    @property
    def unit_columns(self) -> dict[str, int]:
        """The number of columns of each hidden unit, by layer."""
        return {name: units.columns for name, units in self.coupled.items()}

    @property
    def is_one_pass(self) -> bool:
        """Whether one pass through the dense model collects all statistics, including those for the allocation."""
        return self.config.sequential == "none" and bool(self.config.needs)

    @property
    def observed(self) -> frozenset[str]:
        """The statistics that are collected before a unit is pruned."""
        return self.config.needs if self.is_one_pass else self.config.unit_needs

    def dense_layers(
        self,
        layers: Sequence[Layer],
        inputs: Mapping[str, InputStatistics] = {},
        gradients: Mapping[str, GradientStatistics] = {},
        reading: Callable[[str], None] = lambda name: None,
    ) -> list[DenseLayer]:
        """Describe layers to an allocation, which calls `reading` with a layer's name before it reads the weight."""
        whole = WholeMatrices(self.processes)

        def read(layer: Layer) -> Tensor:
            reading(layer.name)
            return whole(layer)

        return [
            DenseLayer(
                layer.name,
                self.inventory.blocks[layer.name],
                layer.size,
                self.config.pattern.sparsity_steps(*layer.shape),
                partial(read, layer),
                inputs.get(layer.name, InputStatistics()),
                gradients.get(layer.name),
            )
            for layer in layers
        ]

    def allocate(
        self,
        inputs: Mapping[str, InputStatistics],
        gradients: Mapping[str, GradientStatistics] = {},
        progress: bool = False,
        hold: Callable[[str], None] = lambda name: None,
    ) -> Selections:
        """Give each layer its sparsity, the same in all processes; a layer without statistics gets the target.

        `inputs` and `gradients` are those of the dense model. `hold` is called with the name of a layer before its
        weight is read.
        """
        allocation, processes = self.config.allocation, self.processes
        layers = list(self.layers)
        if allocation.needs:
            layers = [layer for layer in layers if layer.name in inputs and inputs[layer.name].count > 0]
        if allocation.reads_gradients:
            layers = [layer for layer in layers if layer.name in gradients]
        sparsities: dict[str, float] = {}
        shown: set[str] = set()

        def reading(name: str) -> None:
            bar.show(name)
            bar.advance(name not in shown)
            shown.add(name)
            hold(name)

        progress = progress and allocation.reads_weights and not self.coupled
        with processes.fail_together(), ProgressBar("Allocating", len(layers), progress) as bar:
            if processes.rank == 0 and self.coupled:
                sparsities = self._unit_sparsities(gradients)
            elif layers and (processes.rank == 0 or (allocation.reads_weights and is_sharded(self.model))):
                sparsities = allocation(self.dense_layers(layers, inputs, gradients, reading), self.config.sparsity)
            # One process decides: singular values that differ in the last digit could give different masks. All read
            # the layers if they are sharded, because each holds some rows.
            sparsities = processes.broadcast(sparsities, 0)
        weighed = gradients if self.config.pattern.weigh_rows else {}
        return self.selections(sparsities, {name: each.row_weights() for name, each in weighed.items()})

    def _unit_sparsities(self, gradients: Mapping[str, GradientStatistics]) -> dict[str, float]:
        """Give each layer that reads hidden units the fraction of them that becomes zero."""
        pattern, allocation, layers = self.config.pattern, self.config.allocation, list[UnitLayer]()
        assert isinstance(pattern, Structured)
        for name, units in self.coupled.items():
            scores = gradients[name].units if name in gradients else None
            if scores is not None or not allocation.reads_gradients:
                layers.append(UnitLayer(name, re.sub(r"\d+", "*", name), units.width, scores))
        found = allocation.of_units(layers, self.config.sparsity, pattern) if layers else {}
        return {layer.name: 1 - pattern.kept(layer.width, found[layer.name]) / layer.width for layer in layers}

    def selections(self, sparsities: Mapping[str, float], row_weights: Mapping[str, RowWeights] = {}) -> Selections:
        """Return how the weights of each layer are selected; a layer without a sparsity of its own gets the target."""
        selections: dict[str, Selection] = {}
        for layer in self.layers:
            sparsity = sparsities.get(layer.name, self.config.sparsity)
            pattern = self.config.pattern.for_sparsity(sparsity)
            if layer.name in self.coupled:
                assert isinstance(pattern, Structured)
                pattern = replace(pattern, columns=self.coupled[layer.name].columns)
            selection = Selection(self.config.criterion, pattern, sparsity)
            weighed = layer.name in row_weights
            selections[layer.name] = replace(selection, row_weights=row_weights[layer.name]) if weighed else selection
        return selections


def config_for(config: PruningConfig, model: nn.Module) -> PruningConfig:
    """Return the choices for one model, which decides about `sequential`, `weigh_rows=None` and `blocks=None`.

    `"auto"` and `"one_pass"` are `"none"` for image models. For others, `"one_pass"` is `"layer"`, and `"auto"` is
    `"block"`, or `"layer"` if whole hidden units are pruned: a block usually has one layer that reads units, so the
    statistics are the same, in one pass instead of two. If blocks are trained, or sharded by FSDP2, `"block"` replaces
    `"layer"`.
    """
    is_image, pattern, sequential = reads_images(model), config.pattern, config.sequential
    recovery = config.recovery.for_model(is_image and not pattern.prunes_units, sequential)
    if isinstance(pattern, Unstructured) and pattern.weigh_rows is None:
        pattern = replace(pattern, weigh_rows=not is_image)
    if sequential in ("auto", "one_pass"):
        by_layer = (sequential == "one_pass" or pattern.prunes_units) and not (recovery.recorded or is_sharded(model))
        sequential = "none" if is_image else "layer" if by_layer else "block"
    return replace(config, pattern=pattern, recovery=recovery, sequential=sequential)


def make_plan(
    config: PruningConfig, model: nn.Module, processes: Processes = SINGLE_PROCESS, has_weights: bool = True
) -> Plan:
    """Find what will be pruned, without changing the model; check its weights if they are in memory.

    Raises:
        ValueError: If the model cannot be pruned as asked.
    """
    if not isinstance(model, nn.Module):  # a class, or the arguments are swapped
        found = f"the class {model.__name__}" if isinstance(model, type) else shown(model)
        raise UserError(f"model must be a torch.nn.Module, but it is {found}. Call prune(model, batches).")
    reshard(model)
    preset, config = config.preset, config_for(config, model)
    # Blocks are loaded or trained one at a time, also to be pruned with statistics of the dense model.
    by_block = config.recovery.recorded or not has_weights
    stops = "block" if config.sequential == "none" and by_block else config.sequential
    inventory = find_layers(model, stops, config.skip, config.only, config.pattern)
    plan = Plan(config, model, processes, inventory, preset=preset)
    if is_sharded(model):
        config.recovery.check_sharded()
    with torch.inference_mode(False), torch.no_grad():
        refuse_nothing_to_prune(config, inventory)
        refuse_rounding(config, {layer.name: layer.width for layer in inventory.layers})
        refuse_sharding(config, model, inventory, processes)
        if has_weights:
            refuse_unprunable(inventory.layers)
        config.allocation.check(plan.dense_layers(plan.layers), config.sparsity)
    return plan
