"""Check that a model has mixtures of experts, and that each computes the same without some of them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from typing import Any

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Module

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Experts
from wanda_lightning.core.rounding import coarsest_eps
from wanda_lightning.core.types import Units
from wanda_lightning.experts.mixtures import CHOSEN_GROUPS, PER_TOKEN, Mixture, mixtures
from wanda_lightning.experts.saliency import ExpertSaliency, unroutable
from wanda_lightning.models import Inventory, SkipReason, adapted_module
from wanda_lightning.parallel import Processes
from wanda_lightning.units.block_runs import BlockRuns

_SAME = 0.9  # fraction of the tokens whose results must not change where logits tie


def refuse_without_mixtures(config: PruningConfig, model: Module, inventory: Inventory) -> None:
    """If experts are to leave, refuse a model in which none can, as far as it shows before it runs."""
    if config.pattern.removes == "experts":
        find_mixtures(config, model, inventory)


def find_mixtures(config: PruningConfig, model: Module, inventory: Inventory) -> list[Mixture]:
    """Return the mixtures of the model, or refuse the model."""
    found = list(mixtures(model))
    problem = _why_not(config, model, inventory, found)
    if problem:
        raise UserError(f"{config.shown('pattern')} {problem} To make zeros instead, use prune.")
    return found


def pattern_of(config: PruningConfig) -> Experts:
    """Return the pattern of a configuration that removes experts."""
    assert isinstance(config.pattern, Experts)
    return config.pattern


def _why_not(
    config: PruningConfig, model: Module, inventory: Inventory, found: Sequence[Mixture]
) -> str:
    """Return why experts cannot leave the model; empty if they can."""
    if adapted_module(model):
        return "needs whole layers, but the model has adapters. Merge them first."
    if not found:
        return (
            "needs a mixture of experts, but no module of the model has experts in stacked parameters (a list of "
            "modules does not count) and a router with one row for each of them."
        )

    first = found[0]
    if len({mixture.name for mixture in found}) < len(found):
        return f"needs all matrices of a mixture in one module, but those of {first.name} are in several."
    sizes = {(mixture.number, mixture.groups): mixture.name for mixture in found}
    if len(sizes) > 1:
        names = " as in ".join(sizes.values())
        return f"needs as many experts in {names}, in as many groups."

    matrices = tuple(f"{mixture.prefix}." for mixture in found)
    for skipped in inventory.skipped_for(SkipReason.USER):
        if skipped.name.startswith(matrices):
            return f"drops experts in every layer, but skip or only leaves out {skipped.name}."

    size = first.number // first.groups
    kept = pattern_of(config).kept(size, config.sparsity)
    if kept == 0 or (kept == size and config.sparsity > 0):
        groups = f" in each of the {first.groups} groups" if first.groups > 1 else ""
        return (
            f"drops {'none' if kept else 'all'} of the {size} experts{groups}. "
            f"Choose at least {1 / size:.3g} and at most {1 - 1 / size:.3g}."
        )

    per_token = first.declared(PER_TOKEN)
    chosen_groups = first.groups
    if first.groups > 1:
        chosen_groups = first.declared(CHOSEN_GROUPS) or first.groups
    if kept * chosen_groups < per_token:
        within = ""
        if first.groups > 1:
            within = f" in the groups that are chosen for it, {chosen_groups} of {first.groups}"
        return (
            f"leaves {kept * first.groups} of {first.number} experts, and a token {kept * chosen_groups}{within}, but "
            f"it is routed to {per_token}. Choose at most {1 - ceil(per_token / chosen_groups) / size:.3g}."
        )
    return ""


def refuse_if_it_differs(
    config: PruningConfig,
    mixture: Mixture,
    saliency: ExpertSaliency,
    keep: Units,
    processes: Processes,
) -> None:
    """Refuse a mixture that does not compute the same without experts as with these experts unroutable."""
    kept = int(keep.sum())
    is_same = True  # for a process without a batch
    call = saliency.first_calls.pop(mixture.name, None)  # it holds activations
    if call:
        is_same = _computes_same(mixture, call, keep)
        # A token cannot choose more experts than there are.
        is_same = is_same and saliency.experts_per_token[mixture.name] <= kept
    if not processes.all_agree(is_same):
        raise UserError(
            f"{config.shown('pattern')} leaves {kept} of {mixture.number} "
            f"experts, but without the others {mixture.name} ({type(mixture.module).__name__}) computes something "
            "else than with the others unroutable: a token may need more experts, or the experts are used in another "
            f"way. Remove fewer, or make zeros with prune."
        )


def _computes_same(mixture: Mixture, call: Call, keep: Units) -> bool:
    """Run a call with the other experts unroutable, and without them; return whether the results are the same."""
    runs = []

    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        results = tensors_within(mixture.module.forward(*args, **kwargs))
        # Some mixtures also return a logit for each expert.
        runs.append(
            [x[..., keep.to(x.device)] if x.shape[-1:] == keep.shape else x for x in results]
        )
        return runs[-1]

    with ExitStack() as undo, ExitStack() as lowered:
        lowered.enter_context(unroutable(mixture, ~keep))

        def take() -> None:
            lowered.close()
            undo.callback(mixture.take(keep))

        block_runs = BlockRuns(mixture.module, replace(call, forward=forward))
        is_same = block_runs.same_after(take)
        if not is_same and len(runs) == 2:
            is_same = _same_but_for_ties(*runs)
    return is_same


def _same_but_for_ties(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether most tokens have the same results in 16 bits, where logits tie, and a router may choose either expert."""
    eps = coarsest_eps(before)
    if eps < 1e-4 or [x.shape for x in before] != [y.shape for y in after]:
        return False
    shares = []
    for old, new in zip(before, after, strict=True):
        if old.ndim < 2:
            continue
        old_rows = old.float().reshape(-1, old.shape[-1])
        new_rows = new.float().reshape(-1, new.shape[-1])
        error = vector_norm(old_rows - new_rows, dim=1)
        is_same = error <= 8 * eps * vector_norm(old_rows, dim=1)
        shares.append(float(is_same.double().mean()))
    return min(shares, default=0.0) > _SAME
