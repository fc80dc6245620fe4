"""Remove whole experts: score what each adds, and take those with the smallest saliency out of each mixture."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch.nn import Module

from wanda_lightning.calibration import observer
from wanda_lightning.calibration.observer import Observation, StopObserver
from wanda_lightning.common.aliases import Action
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.types import Units
from wanda_lightning.experts.mixture_checks import find_mixtures, pattern_of, refuse_if_it_differs
from wanda_lightning.experts.mixtures import Mixture, counters_in
from wanda_lightning.experts.saliency import ExpertSaliency
from wanda_lightning.models import (
    Inventory,
    Layer,
    SkippedMatrix,
    SkipReason,
    Stop,
    number_of_parameters,
)
from wanda_lightning.models.layers import named_modules
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.removal import Removal
from wanda_lightning.planning.run import KeptEntries, Run
from wanda_lightning.report import PrunedLayer, PruningReport
from wanda_lightning.units.candidates import replace_attributes
from wanda_lightning.units.fit_configuration import fit_configuration


class RemoveExperts(Removal):
    """Whole experts leave each mixture, in place. The report counts their weights in the sparsity.

    With `sequential="none"`, all experts are scored in the dense model; with `"block"`, those of each block after the
    mixtures of earlier blocks became smaller. Before a mixture changes, it is run without the experts that were chosen:
    it must compute the same as with these experts unroutable.
    """

    expert_noun = "expert"
    fate_of_rare_experts = "scored by these"
    inspect_note = "--pattern experts removes whole experts, and leaves the layers outside of the experts as they are."

    def __init__(self) -> None:
        self._mixtures: list[Mixture] = []
        # Those that still have all experts, by the module that holds the experts.
        self._complete: dict[Module, Mixture] = {}
        self._saliency = ExpertSaliency([])
        self._dense_parameters = 0

    def check(self, config: PruningConfig, model: Module, inventory: Inventory) -> None:
        """Refuse a model without mixtures of experts, or with some that cannot lose as many experts."""
        find_mixtures(config, model, inventory)

    def find(self, run: Run) -> Run:
        """Find the mixtures, and refuse a model without a configuration for the rest, before any batch runs."""
        plan = run.plan
        with plan.processes.fail_together():
            self._mixtures = find_mixtures(plan.config, plan.model, plan.inventory)
            with ExitStack() as undo:
                for mixture in self._mixtures:
                    undo.callback(_take_shapes(plan.config, mixture))
                undo.callback(_declare(plan.config, plan.model, self._mixtures))

        self._complete = {mixture.experts: mixture for mixture in self._mixtures}
        average = pattern_of(plan.config).average
        self._saliency = ExpertSaliency(self._mixtures, average, plan.processes)
        self._dense_parameters = number_of_parameters(plan.model)
        for layer in plan.layers:
            if layer.module not in self._complete or layer.expert is None:
                run.done.skipped[layer.name] = SkippedMatrix(
                    layer.name,
                    layer.stored_shape,
                    SkipReason.UNCOUPLED,
                    "no matrix of a routed expert",
                )
        return run

    def observer(self, plan: Plan) -> StopObserver:
        """Return what measures the saliency of each expert."""
        return self._saliency

    def prune(self, run: Run, stop: Stop, observation: Observation) -> None:
        """Take experts out of the mixtures of one stop."""
        processes = run.plan.processes
        mixtures = self._complete_mixtures(stop.layers)
        keep = {mixture.name: self._choose(run.plan.config, mixture) for mixture in mixtures}
        # One process decides: sums that differ in the last digit could give another choice.
        keep = processes.broadcast(keep, 0)

        # All are checked before the first one changes.
        for mixture in mixtures:
            refuse_if_it_differs(
                run.plan.config, mixture, self._saliency, keep[mixture.name], processes
            )
        names = {module: name for name, module in named_modules(run.plan.model).items()}
        for mixture in mixtures:
            self._record(run, mixture, keep[mixture.name])
            indices = keep[mixture.name].nonzero().flatten().tolist()
            for slot in mixture.slots:
                name = f"{names[slot.module]}.{slot.name}"
                run.done.kept[name] = KeptEntries(slot.dim, indices)
            assert run.buffers is not None
            with run.buffers.changing(slot.module for slot in mixture.slots):
                mixture.take(keep[mixture.name])
            del self._complete[mixture.experts]

    def restore(self, run: Run, layers: Sequence[Layer]) -> None:
        """Make the mixtures of a stop small; an earlier run has written what is left."""
        for mixture in self._complete_mixtures(layers):
            _take_shapes(run.plan.config, mixture)
            del self._complete[mixture.experts]

    def refuse_unreached(self, run: Run) -> None:
        """Refuse a mixture that no sample has reached."""
        for mixture in self._complete.values():
            self._choose(run.plan.config, mixture)

    def finish(self, run: Run) -> None:
        """Declare how many experts are left, in the modules and in the configuration."""
        _declare(run.plan.config, run.plan.model, self._mixtures)

    def complete(self, plan: Plan, report: PruningReport) -> PruningReport:
        """Count the parameters that are gone in the sparsity, and say so."""
        criterion = "REAP" if pattern_of(plan.config).average else "summed REAP"
        zeros = self._dense_parameters - number_of_parameters(plan.model)
        before = self._mixtures[0].number
        gone = before - len(self._mixtures[0].slots[-1].tensor)
        note = (
            f"{gone} of {before} experts were taken out of each of {quantity(len(self._mixtures), 'layer')}: "
            f"{zeros:,} parameters, which count as sparsity"
        )
        return replace(
            report,
            parameters=self._dense_parameters,
            zeros=zeros,
            # The method and the criterion choose weights, not experts.
            config={**report.config, "preset": "", "criterion": {"name": criterion}},
            notes=(note, *report.notes),
        )

    def _complete_mixtures(self, layers: Sequence[Layer]) -> list[Mixture]:
        """Return the mixtures of these layers that still have all experts."""
        modules = dict.fromkeys(layer.module for layer in layers)
        return [self._complete[module] for module in modules if module in self._complete]

    def _choose(self, config: PruningConfig, mixture: Mixture) -> Units:
        """Return which experts of a mixture stay."""
        saliency = self._saliency.of(mixture)
        problem = ""
        if not self._saliency.tokens(mixture).any():
            problem = "get no token except padding"
        elif not saliency.isfinite().all():
            problem = "return NaN or infinity"
        if problem:
            raise UserError(
                f"batches must give finite activations in all layers, but the experts of {mixture.name} {problem}. "
                "Check the batches and the weights, and that forward= runs the model; load it in float32 or bfloat16."
            )
        scores = saliency.float().view(mixture.groups, -1)
        return config.pattern(scores, config.sparsity).flatten()

    def _record(self, run: Run, mixture: Mixture, keep: Units) -> None:
        """Record the matrices of dropped experts as zeros."""
        tokens_of = self._saliency.tokens(mixture)
        saliency_of = self._saliency.of(mixture)
        seen = set()  # an expert may have several matrices
        for layer in run.plan.layers:
            if layer.module is not mixture.experts or layer.expert is None:
                continue
            is_dropped = not keep[layer.expert]
            tokens = int(tokens_of[layer.expert])
            note = ""
            if is_dropped:
                note = "dropped"
            elif mixture.name in self._saliency.padding_counted:
                note = "padding counted"
            run.done.layers[layer.name] = PrunedLayer(
                name=layer.name,
                shape=layer.shape,
                target=float(is_dropped),
                sparsity=float(is_dropped),
                tokens=tokens,
                note=note,
                siblings=layer.siblings,
                block=run.plan.inventory.blocks[layer.name],
                saliency=float(saliency_of[layer.expert]),
            )
            if tokens < observer.MIN_EXPERT_TOKENS and layer.expert not in seen:
                run.done.few_tokens[layer.name] = tokens
            seen.add(layer.expert)


def _take_shapes(config: PruningConfig, mixture: Mixture) -> Action:
    """Make a mixture as small as without the experts that leave, but without data; return a function that undoes it."""
    scores = torch.zeros(mixture.groups, mixture.number // mixture.groups)
    keep = config.pattern(scores, config.sparsity).flatten()
    undo = ExitStack()
    undo.callback(mixture.drop_data())
    undo.callback(mixture.take(keep))
    return undo.close


def _declare(config: PruningConfig, model: Module, mixtures: Sequence[Mixture]) -> Action:
    """Tell the modules around the smaller mixtures, and the configuration, how many experts are left.

    Returns:
        A function that undoes it.

    Raises:
        UserError: If no configuration describes the model; this is undone then.
    """
    left = len(mixtures[0].slots[-1].tensor)
    counters = counters_in(model, mixtures[0].number)
    undo = ExitStack()
    undo.callback(replace_attributes((module, name, left) for module, name in counters))
    problem, undo_configuration = fit_configuration(model)
    undo.callback(undo_configuration)
    if problem:
        undo.close()
        raise UserError(
            f"{config.shown('pattern')} changes the shapes of the model, but {problem}. "
            "Use pattern='unstructured' or '2:4'."
        )
    return undo.close
