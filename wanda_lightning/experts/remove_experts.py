"""Remove whole experts: score what each adds, and take those with the smallest saliency out of each mixture."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch.nn import Module

from wanda_lightning.calibration import observer
from wanda_lightning.calibration.observer import Observation
from wanda_lightning.common.aliases import Action
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.types import Units
from wanda_lightning.experts.mixture_checks import find_mixtures, refuse_if_it_differs
from wanda_lightning.experts.mixtures import Mixture, counters_in
from wanda_lightning.experts.saliency import ExpertSaliency
from wanda_lightning.loop.coverage import low_coverage
from wanda_lightning.loop.make_report import left_dense, make_report
from wanda_lightning.loop.plan import Plan
from wanda_lightning.loop.run import KeptEntries, Run
from wanda_lightning.loop.steps import (
    correct_batch_norm,
    observe_batch_norm,
    observe_in_one_pass,
    pruning,
    visit_stops,
)
from wanda_lightning.models import (
    Layer,
    SkippedMatrix,
    SkipReason,
    Stop,
    number_of_parameters,
)
from wanda_lightning.models.layers import named_modules
from wanda_lightning.report import PrunedLayer, PruningReport
from wanda_lightning.units.candidates import replace_attributes
from wanda_lightning.units.fit_configuration import fit_configuration
from wanda_lightning.units.fit_settings import SHAPES


def remove_experts(run: Run) -> PruningReport:
    """Take whole experts out of each mixture, in place. The report counts their weights in the sparsity.

    With `sequential="none"`, all experts are scored in the dense model; with `"block"`, those of each block after the
    mixtures of earlier blocks became smaller. Before a mixture changes, it is run without the experts that were chosen:
    it must compute the same as with these experts unroutable.
    """
    plan = run.plan
    mixtures = _find_mixtures(plan)
    dense_parameters = number_of_parameters(plan.model)
    removal = _ExpertRemoval(plan, mixtures)
    modules = {mixture.experts for mixture in mixtures}
    for layer in plan.layers:
        if layer.module not in modules or layer.expert is None:
            detail = "no matrix of a routed expert"
            run.done.skipped[layer.name] = SkippedMatrix(
                layer.name, layer.stored_shape, SkipReason.UNCOUPLED, detail
            )

    batch_norm = observe_batch_norm(run)
    run = observe_in_one_pass(run, removal.saliency)
    with pruning(run):
        visit_stops(run, removal.saliency, removal.prune_stop, removal.restore)
        removal.refuse_unreached()
        run.store.finish(run)
    _declare(plan.config, plan.model, mixtures)
    run = correct_batch_norm(run, batch_norm)

    dense = left_dense(run)
    notes = low_coverage(plan.inventory, dense)
    report = make_report(run, dense, notes, rare_experts=("expert", "scored by these"))
    return _with_parameters(report, plan, mixtures, dense_parameters)


def _find_mixtures(plan: Plan) -> list[Mixture]:
    """Find the mixtures, and refuse a model without a configuration for the rest, before any batch runs."""
    with plan.processes.fail_together():
        mixtures = find_mixtures(plan.config, plan.model, plan.inventory)
        with ExitStack() as undo:
            for mixture in mixtures:
                undo.callback(_take_shapes(plan.config, mixture))
            undo.callback(_declare(plan.config, plan.model, mixtures))
    return mixtures


def _with_parameters(
    report: PruningReport, plan: Plan, mixtures: Sequence[Mixture], dense_parameters: int
) -> PruningReport:
    """Count the parameters that are gone in the sparsity, and say so."""
    zeros = dense_parameters - number_of_parameters(plan.model)
    before = mixtures[0].number
    gone = before - len(mixtures[0].slots[-1].tensor)
    note = (
        f"{gone} of {before} experts were taken out of each of {quantity(len(mixtures), 'layer')}: "
        f"{zeros:,} parameters, which count as sparsity"
    )
    return replace(
        report,
        parameters=dense_parameters,
        zeros=zeros,
        # The method and the criterion choose weights, not experts.
        config={**report.config, "preset": "", "criterion": {"name": "summed REAP"}},
        notes=(note, *report.notes),
    )


class _ExpertRemoval:
    """Takes experts out of the mixtures of one stop after the other."""

    def __init__(self, plan: Plan, mixtures: Sequence[Mixture]) -> None:
        self.saliency = ExpertSaliency(mixtures, plan.processes)
        self._config = plan.config
        # Those that still have all experts, by the module that holds the experts.
        self._complete = {mixture.experts: mixture for mixture in mixtures}

    def prune_stop(self, run: Run, stop: Stop, observation: Observation) -> None:
        """Take experts out of the mixtures of one stop."""
        processes = run.plan.processes
        mixtures = self._complete_mixtures(stop.layers)
        keep = {mixture.name: self._choose(mixture) for mixture in mixtures}
        # One process decides: sums that differ in the last digit could give another choice.
        keep = processes.broadcast(keep, 0)

        # All are checked before the first one changes.
        for mixture in mixtures:
            refuse_if_it_differs(
                self._config, mixture, self.saliency, keep[mixture.name], processes
            )
        names = {module: name for name, module in named_modules(run.plan.model).items()}
        for mixture in mixtures:
            self._record(run, mixture, keep[mixture.name])
            indices = keep[mixture.name].nonzero().flatten().tolist()
            for slot in mixture.slots:
                name = f"{names[slot.module]}.{slot.name}"
                run.done.kept[name] = KeptEntries(slot.dim, indices)
            mixture.take(keep[mixture.name])
            del self._complete[mixture.experts]

    def restore(self, layers: Sequence[Layer]) -> None:
        """Make the mixtures of a stop small; an earlier run has written what is left."""
        for mixture in self._complete_mixtures(layers):
            _take_shapes(self._config, mixture)
            del self._complete[mixture.experts]

    def refuse_unreached(self) -> None:
        """Refuse a mixture that no sample has reached."""
        for mixture in self._complete.values():
            self._choose(mixture)

    def _complete_mixtures(self, layers: Sequence[Layer]) -> list[Mixture]:
        """Return the mixtures of these layers that still have all experts."""
        modules = dict.fromkeys(layer.module for layer in layers)
        return [self._complete[module] for module in modules if module in self._complete]

    def _choose(self, mixture: Mixture) -> Units:
        """Return which experts of a mixture stay."""
        saliency = self.saliency.of(mixture)
        problem = ""
        if not self.saliency.tokens(mixture).any():
            problem = "get no token except padding"
        elif not saliency.isfinite().all():
            problem = "return NaN or infinity"
        if problem:
            raise UserError(
                f"batches must give finite activations in all layers, but the experts of {mixture.name} {problem}. "
                "Check the batches and the weights, and that forward= runs the model; load it in float32 or bfloat16."
            )
        scores = saliency.float().view(mixture.groups, -1)
        return self._config.pattern(scores, self._config.sparsity).flatten()

    def _record(self, run: Run, mixture: Mixture, keep: Units) -> None:
        """Record the matrices of dropped experts as zeros."""
        tokens_of = self.saliency.tokens(mixture)
        saliency_of = self.saliency.of(mixture)
        seen = set()  # an expert may have several matrices
        for layer in run.plan.layers:
            if layer.module is not mixture.experts or layer.expert is None:
                continue
            is_dropped = not keep[layer.expert]
            tokens = int(tokens_of[layer.expert])
            note = ""
            if is_dropped:
                note = "dropped"
            elif mixture.name in self.saliency.padding_counted:
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
    # After hidden units have left, a modeling file may build the model.
    has_own_shapes = hasattr(getattr(model, "config", None), SHAPES)
    left = len(mixtures[0].slots[-1].tensor)
    counters = counters_in(model, mixtures[0].number)
    undo = ExitStack()
    undo.callback(replace_attributes((module, name, left) for module, name in counters))
    problem, undo_configuration = fit_configuration(model)
    undo.callback(undo_configuration)
    if problem and not has_own_shapes:
        undo.close()
        raise UserError(
            f"{config.shown('pattern')} changes the shapes of the model, but {problem}. "
            "Use prune, which makes zeros."
        )
    return undo.close
