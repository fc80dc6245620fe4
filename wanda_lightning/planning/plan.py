"""The plan of a pruning: the layers, their stops and their sparsities, found before any weight changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor, nn

from wanda_lightning.common.checks import shown
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import DenseLayer, UnitLayer
from wanda_lightning.core.patterns import Structured, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.models import (
    Inventory,
    Layer,
    SkipReason,
    Stop,
    find_layers,
    reads_images,
    tied_tensors,
)
from wanda_lightning.models.layers import named_modules, refuse_no_values
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, is_sharded
from wanda_lightning.units.candidates import RemovableUnits

Selections = Mapping[str, Selection]  # by layer


@dataclass(frozen=True)
class Plan:
    """A model with its layers grouped into stops, and the choices and processes that prune it."""

    config: PruningConfig  # for this model, see `config_for`
    model: nn.Module
    processes: Processes
    inventory: Inventory
    # The hidden units to prune, by the layer that reads them, if whole units are pruned; the layers are these readers.
    coupled: Mapping[str, RemovableUnits] = field(default_factory=dict)
    # Of one unit of each of these; empty if all cost the same.
    costs: Mapping[str, float] = field(default_factory=dict)
    preset: str = ""  # the name for these choices, before the model decided about any

    @property
    def stops(self) -> tuple[Stop, ...]:
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
    def places(self) -> tuple[Stop, ...]:
        """One stop for each block that holds layers, and for each layer outside of all blocks."""
        modules = named_modules(self.model)
        members = dict[str, list[Layer]]()
        for layer in self.layers:
            members.setdefault(self.inventory.blocks[layer.name], []).append(layer)
        return tuple(
            Stop(name, modules.get(name, self.model), tuple(inside))
            for name, inside in members.items()
        )

    @cached_property
    def block_stops(self) -> tuple[Stop, ...]:
        """One stop for each block that holds layers; none contains another."""
        own = {self.model, *(layer.module for layer in self.layers)}
        return tuple(stop for stop in self.places if stop.module not in own)

    @cached_property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The modules of `block_stops`."""
        return tuple(stop.module for stop in self.block_stops if stop.module)

    @cached_property
    def _tied(self) -> set[tuple[nn.Module, str]]:
        return tied_tensors(self.model)

    def fitted_bias(self, layer: Layer) -> Tensor | None:
        """Return the bias of a layer if the solver fits it, too; not one that is shared."""
        if not self.config.solver.intercept:
            return None
        return None if (layer.module, layer.bias_name) in self._tied else layer.bias

    def with_choices(self, config: PruningConfig) -> Plan:
        """Return the plan for other choices that concern the same layers, such as a lower sparsity."""
        return replace(self, config=config_for(config, self.model), preset=config.preset)

    @property
    def is_one_pass(self) -> bool:
        """Whether one pass through the dense model collects all statistics, including those for the allocation."""
        return self.config.sequential == "none" and bool(self.config.needs)

    @property
    def observed(self) -> frozenset[str]:
        """The statistics that are collected before the layers of a stop are pruned."""
        return self.config.needs if self.is_one_pass else self.config.stop_needs

    def dense_layers(
        self,
        layers: Iterable[Layer],
        inputs: Mapping[str, InputStatistics] = {},
        gradients: Mapping[str, GradientStatistics] = {},
        read: Callable[[Layer], Tensor] = Layer.read,
    ) -> list[DenseLayer]:
        """Describe layers to an allocation."""
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
        read: Callable[[Layer], Tensor] = Layer.read,
    ) -> Selections:
        """Give each layer its sparsity, the same in all processes; a layer without statistics gets the target.

        `inputs` and `gradients` are those of the dense model, whose weights `read` returns.
        """
        allocation = self.config.allocation
        layers = list(self.layers)
        sparsities = dict[str, float]()
        if allocation.needs:
            layers = [
                layer for layer in layers if layer.name in inputs and inputs[layer.name].count
            ]
        if allocation.reads_gradients:
            layers = [layer for layer in layers if layer.name in gradients]
        with self.processes.fail_together():
            if self.processes.rank == 0 and self.coupled:
                sparsities = self._unit_sparsities(gradients)
            elif self.processes.rank == 0 and layers:
                sparsities = allocation(
                    self.dense_layers(layers, inputs, gradients, read), self.config.sparsity
                )
                if wrong := {layer.name for layer in layers} ^ sparsities.keys():
                    raise UserError(
                        f"{self.config.shown('allocation')} must return a sparsity for each layer, and for no other, "
                        f"but it did not for {', '.join(sorted(wrong))}."
                    )
            # One process decides: numbers that differ in the last digit could give different masks.
            sparsities = self.processes.broadcast(sparsities, 0)
        return self.selections(sparsities, gradients)

    def cost_of(self, units: Mapping[str, int]) -> float:
        """Return what numbers of hidden units cost, by layer; 0 for layers that the measured batch did not reach."""
        return sum(
            number * (self.costs.get(name, 0.0) if self.costs else 1.0)
            for name, number in units.items()
        )

    def _unit_sparsities(self, gradients: Mapping[str, GradientStatistics]) -> dict[str, float]:
        """Give each layer that reads hidden units, and was measured, the fraction of them that becomes zero."""
        pattern = self.config.pattern
        allocation = self.config.allocation
        layers = list[UnitLayer]()
        assert isinstance(pattern, Structured)
        for name, units in self.coupled.items():
            scores = gradients[name].units if name in gradients else None
            if (scores is not None or not allocation.reads_gradients) and (
                cost := self.cost_of({name: 1})
            ):
                layers.append(UnitLayer(name, re.sub(r"\d+", "*", name), units.width, scores, cost))
        if self.costs and layers:
            mean = sum(layer.cost * layer.width for layer in layers) / sum(
                layer.width for layer in layers
            )
            layers = [replace(layer, cost=layer.cost / mean) for layer in layers]
        found = allocation.of_units(layers, self.config.sparsity, pattern) if layers else {}
        return {
            layer.name: 1 - pattern.kept(layer.width, found[layer.name]) / layer.width
            for layer in layers
        }

    def selections(
        self, sparsities: Mapping[str, float], gradients: Mapping[str, GradientStatistics] = {}
    ) -> Selections:
        """Return how the weights of each layer are selected; a layer without a sparsity of its own gets the target."""
        selections: dict[str, Selection] = {}
        for layer in self.layers:
            sparsity = sparsities.get(layer.name, self.config.sparsity)
            pattern = self.config.pattern.for_sparsity(sparsity)
            if layer.name in self.coupled:
                assert isinstance(pattern, Structured)
                pattern = replace(pattern, columns=self.coupled[layer.name].columns)
            selection = Selection(self.config.criterion, pattern, sparsity)
            if pattern.weigh_rows and layer.name in gradients:
                selection = replace(selection, row_weights=gradients[layer.name].row_weights())
            selections[layer.name] = selection
        return selections


def config_for(config: PruningConfig, model: nn.Module) -> PruningConfig:
    """Return the choices for one model, which decides about `sequential`, `weigh_rows=None` and `blocks=None`.

    `"auto"` and `"one_pass"` are `"none"` for image models. For others, `"one_pass"` is `"layer"`, and `"auto"` is
    `"block"`, or `"layer"` if whole hidden units are pruned: a block usually has one layer that reads units, so the
    statistics are the same, in one pass instead of two. If blocks are trained, `"block"` replaces `"layer"`. If whole
    experts leave, so it does, and `"auto"` is `"none"`.
    """
    is_image = reads_images(model)
    pattern = config.pattern
    sequential = config.sequential
    recovery = config.recovery.for_model(is_image and not pattern.prunes_units, sequential)
    if isinstance(pattern, Unstructured) and pattern.weigh_rows is None:
        pattern = replace(pattern, weigh_rows=not is_image)
    if sequential in ("auto", "one_pass"):
        by_layer = (sequential == "one_pass" or pattern.prunes_units) and not recovery.trains_blocks
        sequential = "none" if is_image else "layer" if by_layer else "block"
    if pattern.drops_experts:
        sequential = "block" if config.sequential in ("block", "layer") else "none"
    return replace(config, pattern=pattern, recovery=recovery, sequential=sequential)


def make_plan(
    config: PruningConfig,
    model: nn.Module,
    processes: Processes = SINGLE_PROCESS,
    by_block: bool = False,
) -> Plan:
    """Find what will be pruned, without reading or changing the weights.

    An error in one of the processes ends all of them. With `by_block`, blocks are loaded one at a time.

    Raises:
        ValueError: If the model cannot be pruned as asked.
    """
    if not isinstance(model, nn.Module):  # a class, or the arguments are swapped
        found = f"the class {model.__name__}" if isinstance(model, type) else shown(model)
        raise UserError(
            f"model must be a torch.nn.Module, but it is {found}. Call prune(model, batches)."
        )
    if is_sharded(model):
        raise UserError(
            "model must be whole in each process, but FSDP or tensor parallelism shards it. Prune it before it is "
            "sharded: with prune, with DDP, or, if it is larger than memory, with prune_from_disk. Then train it with "
            "KeepZeros, which keeps the zeros of sharded models."
        )
    preset = config.preset
    config = config_for(config, model)
    # Blocks are loaded or trained one at a time, also to be pruned with statistics of the dense model.
    by_block |= config.recovery.trains_blocks or config.pattern.drops_experts
    stops = "block" if config.sequential == "none" and by_block else config.sequential
    with processes.fail_together():
        inventory = find_layers(model, stops, config.skip, config.only, config.pattern)
        plan = Plan(config, model, processes, inventory, preset=preset)
        refuse_nothing_to_prune(config, inventory)
        refuse_rounding(config, {layer.name: layer.width for layer in inventory.layers})
        config.allocation.check(plan.dense_layers(plan.layers), config.sparsity)
    return plan


def refuse_nothing_to_prune(config: PruningConfig, inventory: Inventory) -> None:
    """Refuse matrices that the user must decide about, and a model without any layer to prune."""
    undecided = [
        m for m in inventory.skipped if m.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)
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
    unfit = inventory.skipped_for(SkipReason.PATTERN)
    asked = [m for m in inventory.skipped if config.only and m.reason is not SkipReason.USER]
    reasons = "; ".join(
        dict.fromkeys(f"{m.name}: {m.detail}" for m in (unfit or asked or inventory.skipped)[:5])
    )
    which = f"only={list(config.only)} names" if config.only else "model has"
    if unfit:
        which = (
            f"{config.shown('pattern')} fits none of the {quantity(len(unfit), 'layer')}: it leaves"
        )
    raise UserError(
        f"{which} nothing to prune ({reasons or 'there are no weight matrices'}). Give a model with linear or "
        "convolution layers, choose others with skip= and only=, or use pattern='unstructured'."
    )


def refuse_unprunable(layers: Iterable[Layer]) -> None:
    """Refuse weights without values, weights that cannot be written, NaN and infinity."""
    for layer in layers:
        refuse_no_values(layer)
        stored = layer.parameter
        repeats = any(
            step == 0 and size > 1 for step, size in zip(stored.stride(), stored.shape, strict=True)
        )
        # The sum takes one fast pass. It may overflow, so only the slow check of each weight decides.
        is_finite = bool(layer.weight.sum().isfinite() or layer.weight.isfinite().all())
        for is_wrong, found in (
            (
                stored.is_inference(),
                "was created under torch.inference_mode() and cannot change. Build or load the model outside of it.",
            ),
            (
                repeats,
                "was made by expand() and repeats the same numbers. Replace it by nn.Parameter(weight.clone()).",
            ),
            (
                not is_finite,
                "has weights that are NaN or infinite. Check the checkpoint. If its weights overflowed in the "
                "conversion to float16, load it in float32 or bfloat16.",
            ),
        ):
            if is_wrong:
                raise UserError(
                    f"model must have finite weights that can be written, but {layer.name} {found}"
                )


def refuse_rounding(config: PruningConfig, widths: Mapping[str, int]) -> None:
    """Refuse a structured pattern that, rounded, could remove no unit of any layer, or would remove all of them.

    `widths` holds the number of units that each layer reads, or at most reads.
    """
    pattern = config.pattern
    if not isinstance(pattern, Structured) or not widths:
        return
    name, widest = max(widths.items(), key=lambda item: item[1])
    kept = pattern.multiples(widest, config.sparsity)
    multiple = pattern.multiple_of
    for is_wrong, found in (
        (
            widest <= multiple,
            f"multiple_of={multiple} of {config.shown('pattern')} leaves no unit to remove: ",
        ),
        (kept < 1, f"sparsity={config.sparsity:g} would remove all {widest} hidden units: "),
    ):
        if is_wrong:
            raise UserError(
                f"{found}the widest layer, {name}, reads {widest}, in multiples of {multiple}. "
                "Choose another sparsity, or a smaller multiple_of."
            )
