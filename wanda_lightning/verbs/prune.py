"""Prune a model in one shot: `prune`, and what the callbacks call."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from wanda_lightning.calibration.batches import BatchFunction
from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.gradients import check_predictions
from wanda_lightning.calibration.observer import PassiveCalibration
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, config_of
from wanda_lightning.loop.plan import DenseStatistics, Plan, make_plan, refuse_unprunable
from wanda_lightning.loop.run import Run, WeightStore
from wanda_lightning.loop.steps import begin, data_reader, norms_to_correct, with_sparsities
from wanda_lightning.report import PruningReport
from wanda_lightning.training.predictions import predictions_of
from wanda_lightning.verbs.prune_weights import (
    choose_sparsities,
    pattern_for,
    prune_stop,
    prune_weights,
    report_on_weights,
)

log = logging.getLogger(__name__)

_ONE_LOOP = "the batches of a validation loop run only once"


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float | PruningConfig = 0.5,
    *,
    forward: BatchFunction | None = None,
    progress: bool = True,
    **choices: Unpack[PruningChoices],
) -> PruningReport:
    """Prune any model in place: the weights with the smallest scores become zero.

    `forward(batch)` runs one batch through the model. The default is `model(**batch)` for a mapping, without the keys
    that the model's forward does not take, `model(batch[0])` for a tuple or list, and `model(batch)` for a tensor. The
    zeros of an `attention_mask` in a mapping mark padding, which does not count. `position_ids` that restart (packed
    documents) exclude no token. A model that tokenizes texts, such as a `SentenceTransformer`, gets the mapping itself.

    Args:
        model: The model; only its weights and the running statistics of BatchNorm layers change, in place; with the
            solvers `ADMM` and `Refit`, biases of the pruned layers, too.
        batches: Calibration batches, or a list of texts for a model that tokenizes them; all of them are used.
            `Magnitude` needs none, except for BatchNorm layers.
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1); or a `PruningConfig` with all
            choices.
        forward: Runs one batch through the model.
        progress: Show a bar (plain lines if there is no terminal).
        **choices: The other arguments of `PruningConfig`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `sequential`, `skip`, `only`, `keep_batch_norm`.

    Returns:
        The report, which lists every matrix as pruned or skipped.

    Raises:
        ValueError: If the model cannot be pruned as asked, before any weight is written; or if an activation is NaN or
            infinite.
    """
    config = config_of(sparsity, prune, **choices)
    return prune_weights(begin(make_plan(config, model), batches, forward, progress=progress))


def rehearse(
    plan: Plan,
    find_batches: Callable[[], Iterable[Any] | None],
    forward: BatchFunction,
    predict: BatchFunction,
) -> None:
    """Raise the errors of a later pruning that the weights or one forward pass of the first batch show.

    `find_batches` is called if a choice reads batches, and returns None if no batch can be spared.
    """
    config = plan.config
    with plan.processes.fail_together():
        refuse_unprunable(plan.layers)
        reader = data_reader(plan)
        batches = find_batches() if reader else None
    if batches is None:
        return

    samples = Samples(plan.model, batches, forward, predict, plan.processes, reader)
    with pruning_mode(plan.model), plan.processes.fail_together():
        for sample in samples:
            if config.reads_gradients:
                check_predictions(plan.layers, samples.split(sample)[0])
            elif config.recovery.reads_batches:
                predictions_of(samples.split(sample)[0].predict())
            else:
                sample.forward()
            break
    samples.refuse_if_empty()


def prune_collected(plan: Plan, passive: PassiveCalibration) -> PruningReport:
    """Prune with the statistics that were collected from forward passes of the dense model.

    Raises:
        ValueError: Before any weight is written, if there was no batch or an activation is NaN or infinite.
    """
    # The report says what could not be done, instead of a refusal: the loop has ended.
    not_corrected = _ONE_LOOP if norms_to_correct(plan) else ""
    samples = Samples(plan.model, None, None, None, plan.processes, None)
    run = Run(plan, samples, WeightStore(), not_corrected=not_corrected)
    with (
        run.clock.timed("prune"),
        torch.inference_mode(False),
        torch.no_grad(),
        note_on_error(run.describe_progress, log.error),
    ):
        with plan.processes.fail_together():
            refuse_unprunable(plan.layers)
        observation, samples.total = passive.finish()
        run = with_sparsities(
            run, DenseStatistics(observation.inputs), choose_sparsities, pattern_for
        )
        prune_stop(run, plan.whole_model, observation)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    return report_on_weights(run)
