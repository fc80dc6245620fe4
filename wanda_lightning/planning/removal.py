"""What leaves a model: weights, hidden units or experts. Each is one class, with the same methods."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch.nn import Module

from wanda_lightning.calibration.observer import Observation, Observer, StopObserver
from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import Sparsities
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.selection import Selection
from wanda_lightning.models import Inventory, Layer, ReadWeight, SkippedMatrices, Stop
from wanda_lightning.planning.coverage import Note, low_coverage
from wanda_lightning.planning.plan import DenseStatistics, Plan
from wanda_lightning.planning.run import Run
from wanda_lightning.report import PruningReport


class Removal(ABC):
    """Removes weights, hidden units or experts from a model. Each run has an object of its own.

    The methods stand in the order in which `prune_as` calls them; commands also call `check` before anything runs.
    """

    # How the report names an expert that got few tokens, and says what follows for it.
    expert_noun = "expert layer"
    fate_of_rare_experts = "pruned with the statistics of all experts"

    # What `inspect` should say about the layers of the plan.
    inspect_note = ""

    def check(  # noqa: B027  # weights can leave any layer of a plan
        self, config: PruningConfig, model: Module, inventory: Inventory
    ) -> None:
        """Refuse a model from which nothing can leave, as far as it shows before it runs."""

    def find(self, run: Run) -> Run:
        """Find what can leave, in the dense model, and return the run with a plan for that alone.

        Raises:
            UserError: If nothing can leave. Nothing has changed then.
        """
        return run

    @property
    def unit_columns(self) -> Mapping[str, int]:
        """Columns of each hidden unit, by the layer that reads it, if gradients are summed over units."""
        return {}

    def choose_sparsities(self, plan: Plan, dense: DenseStatistics, read: ReadWeight) -> Sparsities:
        """Return the sparsity of each layer with all statistics that the allocation reads, in one process for all.

        `read` returns the weights of the dense model.
        """
        allocation = plan.config.allocation
        layers = plan.layers
        if allocation.needs:
            reached = {name for name, inputs in dense.inputs.items() if inputs.count}
            layers = tuple(layer for layer in layers if layer.name in reached)
        if allocation.reads_gradients:
            layers = tuple(layer for layer in layers if layer.name in dense.gradients)
        if not layers:
            return {}

        described = plan.dense_layers(layers, dense, read)
        sparsities = allocation(described, plan.config.sparsity)
        wrong = {layer.name for layer in layers} ^ sparsities.keys()
        if wrong:
            raise UserError(
                f"{plan.config.shown('allocation')} must return a sparsity for each layer, and for no other, "
                f"but it did not for {', '.join(sorted(wrong))}."
            )
        return sparsities

    def pattern_for(self, plan: Plan, layer: Layer, sparsity: float) -> Pattern:
        """Return the pattern of a layer with a sparsity of its own."""
        return plan.config.pattern.for_sparsity(sparsity)

    def selections(
        self,
        plan: Plan,
        sparsities: Sparsities,
        dense: DenseStatistics = DenseStatistics(),
    ) -> dict[str, Selection]:
        """Return how the weights of each layer are selected; a layer without a sparsity of its own gets the target."""
        selections = {}
        for layer in plan.layers:
            sparsity = sparsities.get(layer.name, plan.config.sparsity)
            pattern = self.pattern_for(plan, layer, sparsity)
            selection = Selection(plan.config.criterion, pattern, sparsity)
            if pattern.weigh_rows and layer.name in dense.gradients:
                selection = replace(
                    selection, row_weights=dense.gradients[layer.name].row_weights()
                )
            selections[layer.name] = selection
        return selections

    def observer(self, plan: Plan) -> StopObserver:
        """Return what measures each stop, or the dense model, before anything leaves."""
        return Observer(plan.observed, plan.processes)

    @abstractmethod
    def prune(self, run: Run, stop: Stop, observation: Observation) -> None:
        """Choose what leaves at a stop, take it out, and record it in `run.done`."""

    def restore(self, run: Run, layers: Sequence[Layer]) -> None:  # noqa: B027  # zeros change no shape
        """Give layers the shapes that they have after pruning: an interrupted run has pruned and written them."""

    def refuse_unreached(self, run: Run) -> None:  # noqa: B027  # the report lists layers that stay dense
        """Raise a UserError if something could not be chosen, because no sample has reached it."""

    def finish(self, run: Run) -> None:  # noqa: B027  # zeros need no description
        """Adapt what describes the model, after the last stop."""

    def left_dense(self, dense: SkippedMatrices) -> SkippedMatrices:
        """Return the layers of the plan that stay dense, and what else stays dense with them."""
        return dense

    def coverage(self, inventory: Inventory, dense: SkippedMatrices) -> Note | None:
        """Return a warning if much less of the model was pruned than a user would expect."""
        return low_coverage(inventory, dense)

    def notes(self, run: Run) -> Iterator[Note]:
        """Yield what a user should know about what left."""
        yield from ()

    def settings(self, plan: Plan) -> Kwargs:
        """Return entries for the configuration in the report."""
        limits = plan.config.allocation.limits(plan.config.sparsity)
        return {"allocation_limits": list(limits)} if limits else {}

    def complete(self, plan: Plan, report: PruningReport) -> PruningReport:
        """Return the report with what only this kind of removal knows."""
        return report
