"""Find the mixtures of a model, check that each computes the same without experts, and declare how many are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Experts
from wanda_lightning.core.rounding import coarsest_eps
from wanda_lightning.core.types import Units
from wanda_lightning.experts.mixtures import Mixture, counters_in, mixtures
from wanda_lightning.experts.saliency import ExpertSaliency, unroutable
from wanda_lightning.models import Inventory, SkipReason, adapted_module
from wanda_lightning.parallel import Processes
from wanda_lightning.units.block_runs import BlockRuns
from wanda_lightning.units.candidates import replace_attributes
from wanda_lightning.units.configuration import fit_configuration

_OTHERS = "Use pattern='unstructured' or '2:4'."


def find_mixtures(config: PruningConfig, model: nn.Module, inventory: Inventory) -> list[Mixture]:
    """Return the mixtures of the model, or refuse the model."""
    found = list(mixtures(model))
    shown = config.shown("pattern")
    pattern = config.pattern
    assert isinstance(pattern, Experts)
    sizes = {(mixture.number, mixture.groups): mixture.name for mixture in found}
    experts = tuple(f"{mixture.prefix}." for mixture in found)
    left_out = [
        m.name for m in inventory.skipped_for(SkipReason.USER) if m.name.startswith(experts)
    ]
    size = found[0].number // found[0].groups if found else 1
    sparsity = config.sparsity
    kept = pattern.kept(size, sparsity)
    where = f" in each of the {found[0].groups} groups" if found and found[0].groups > 1 else ""
    for is_wrong, why in (
        (
            adapted_module(model) is not None,
            "needs whole layers, but the model has adapters. Merge them first.",
        ),
        (
            not found,
            "needs a mixture of experts, but no module of the model has experts in stacked parameters (a list of "
            f"modules does not count) and a router with one row for each of them. {_OTHERS}",
        ),
        (
            len({mixture.name for mixture in found}) < len(found),
            f"needs all matrices of a mixture in one module, but those of {found and found[0].name} are in several. "
            f"{_OTHERS}",
        ),
        (
            len(sizes) > 1,
            f"needs as many experts in {' as in '.join(sizes.values())}, in as many groups. {_OTHERS}",
        ),
        (
            left_out,
            f"drops experts in every layer, but skip or only leaves out {', '.join(left_out[:1])}. {_OTHERS}",
        ),
        (
            kept == 0 or (kept == size and sparsity > 0),
            f"drops {'none' if kept else 'all'} of the {size} experts{where} with sparsity={sparsity:g}. Choose at "
            f"least {1 / size:.3g} and at most {1 - 1 / size:.3g}.",
        ),
    ):
        if is_wrong:
            raise UserError(f"{shown} {why}")
    return found


def refuse_wrong(
    config: PruningConfig,
    mixture: Mixture,
    saliency: ExpertSaliency,
    keep: Units,
    processes: Processes,
) -> None:
    """Refuse a mixture that does not compute the same without experts as with these experts unroutable."""

    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        # Perhaps with one logit for each expert.
        results = tensors_within(mixture.module.forward(*args, **kwargs))
        runs.append(
            [x[..., keep.to(x.device)] if x.shape[-1:] == keep.shape else x for x in results]
        )
        return runs[-1]

    kept = int(keep.sum())
    same = True
    runs = list[list[Tensor]]()
    if (call := saliency.first.pop(mixture.name, None)) is not None:  # this process has a batch
        with ExitStack() as undo, ExitStack() as lowered:
            lowered.enter_context(unroutable(mixture, ~keep))

            def take() -> None:
                lowered.close()
                undo.callback(mixture.take(keep))

            same = BlockRuns(mixture.module, [replace(call, forward=forward)]).same_after(take)
            same = same or (len(runs) == 2 and _same_but_for_ties(*runs))
        same = same and saliency.per_token[mixture.name] <= kept
    if not processes.all_agree(same):
        raise UserError(
            f"sparsity={config.sparsity:g} with {config.shown('pattern')} leaves {kept} of {mixture.number} "
            f"experts, but without the others {mixture.name} ({type(mixture.module).__name__}) computes something "
            "else than with the others unroutable: a token may need more experts, or the experts are used in another "
            f"way. Choose a lower sparsity. {_OTHERS}"
        )


def _same_but_for_ties(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether most tokens have the same results in 16 bits, where logits tie, and a router may choose either expert."""
    eps = coarsest_eps(before)
    if eps < 1e-4 or [x.shape for x in before] != [y.shape for y in after]:
        return False
    pairs = zip(before, after, strict=True)
    tokens = [
        (x.float().reshape(-1, x.shape[-1]), y.float().reshape(-1, x.shape[-1]))
        for x, y in pairs
        if x.ndim > 1
    ]
    same = [
        torch.linalg.vector_norm(x - y, dim=1) <= 8 * eps * torch.linalg.vector_norm(x, dim=1)
        for x, y in tokens
    ]
    return bool(same) and all(float(each.double().mean()) > 0.9 for each in same)


def take_shapes(config: PruningConfig, mixture: Mixture) -> Callable[[], None]:
    """Make a mixture as small as without the experts that leave, but without data; return a function that undoes it."""
    scores = torch.zeros(mixture.groups, mixture.number // mixture.groups)
    undo = ExitStack()
    undo.callback(mixture.drop_data())
    undo.callback(mixture.take(config.pattern(scores, config.sparsity).flatten()))
    return undo.close


def declare(
    config: PruningConfig, model: nn.Module, found: Sequence[Mixture]
) -> Callable[[], None]:
    """Tell the modules around the smaller mixtures, and the configuration, how many experts are left.

    Returned is a function that undoes it.

    Raises:
        UserError: If no configuration describes the model; this is undone then.
    """
    undo = ExitStack()
    left = len(found[0].slots[-1].tensor)
    undo.callback(replace_attributes((*each, left) for each in counters_in(model, found[0].number)))
    problem, undo_configuration = fit_configuration(model)
    undo.callback(undo_configuration)
    if problem:
        undo.close()
        raise UserError(
            f"{config.shown('pattern')} changes the shapes of the model, but {problem}. {_OTHERS}"
        )
    return undo.close
