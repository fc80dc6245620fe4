"""Measure how much each expert of a mixture contributes to its output.

REAP's saliency of an expert (Lasby et al. 2025, arXiv 2510.13999) is the mean, over the tokens that are routed to it,
of its gate times the norm of its output: the norm of what it adds for this token. Where a model multiplies the input of
the experts by the gate (Llama 4), it is the norm of what the expert returns for that input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.cloning import clone_arguments, tensors_within
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.thread_state import ThreadState
from wanda_lightning.common.errors import UserError
from wanda_lightning.models import fitting_mask
from wanda_lightning.models.mixtures import Mixture
from wanda_lightning.parallel import Processes


class _Added(NamedTuple):
    """What experts add for tokens, one entry for each token and each expert to which it is routed, or may be."""

    norms: Tensor  # of the vectors that are added
    experts: Tensor  # indices
    routed: Tensor  # False for an entry that does not count


class ExpertSaliency:
    """Sums up the norms of what the experts of some mixtures add, over the tokens of all batches except padding."""

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.first: dict[str, Call] = {}  # the first call of each mixture, by its name
        self.padding_counted: set[str] = set()  # mixtures where the masks do not show which tokens are padding
        self._mixtures = mixtures
        # For each expert the sum of the norms and the number of tokens; in the last column the number of all tokens.
        self._sums = {each.name: torch.zeros(2, each.number + 1, dtype=torch.float64) for each in mixtures}

    @contextmanager
    def collect(self, sample: Sample) -> Iterator[None]:
        """Sum what the experts add while a sample runs in this block."""
        with ExitStack() as hooks:
            for mixture in self._mixtures:
                keep_first = partial(self._keep_first, sample, mixture)
                hooks.callback(mixture.module.register_forward_pre_hook(keep_first, with_kwargs=True).remove)
                watched = mixture.module if mixture.is_list else mixture.experts
                read = partial(self._read, sample, mixture)
                hooks.callback(watched.register_forward_hook(read, with_kwargs=True).remove)
            yield

    def all_reduce(self, processes: Processes) -> None:
        """Sum over all processes."""
        processes.all_reduce_sum([*self._sums.values()])

    def tokens(self, mixture: Mixture) -> Tensor:
        """Return the number of tokens that were routed to each expert."""
        return self._sums[mixture.name][1, :-1]

    def per_token(self, mixture: Mixture) -> int:
        """Return the number of experts to which a token is routed, at most; 0 if the mixture saw no token."""
        routed, seen = self.tokens(mixture).sum(), self._sums[mixture.name][1, -1]
        return int((routed / seen).ceil()) if seen else 0

    def __call__(self, mixture: Mixture) -> Tensor:
        """Return the saliency of each expert, in float64; 0 for experts without tokens."""
        norms, tokens = self._sums[mixture.name][:, :-1]
        return norms / tokens.clamp(min=1)

    def _keep_first(self, sample: Sample, mixture: Mixture, module: nn.Module, args: Any, kwargs: Any) -> None:
        if mixture.name not in self.first:
            args, kwargs = clone_arguments((args, kwargs))
            self.first[mixture.name] = Call(sample, mixture.name, module.forward, args, kwargs, ThreadState())

    def _read(self, sample: Sample, mixture: Mixture, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = tensors_within((args, kwargs))
        try:
            if mixture.is_list:
                added = _from_list(mixture, args, kwargs, partial(self._real, sample, mixture))
            elif any(not tensor.is_floating_point() for tensor in given):
                added = _from_indices(module, args, kwargs, output, partial(self._real, sample, mixture))
            else:
                added = _from_slabs(mixture, given[0], output, partial(self._real, sample, mixture))
        except torch.OutOfMemoryError:
            raise
        except (_Unknown, RuntimeError, IndexError, TypeError) as error:
            raise UserError(
                f"pattern='experts' must see what each expert adds to the output, but {mixture.name} "
                f"({type(mixture.module).__name__}) does not show it: {error}. Use pattern='unstructured' or '2:4'."
            ) from error
        sums, experts = self._sums[mixture.name], added.experts[added.routed].cpu()
        sums[0].index_add_(0, experts, added.norms[added.routed].double().cpu())
        sums[1].index_add_(0, experts, torch.ones(len(experts), dtype=torch.float64))

    def _real(self, sample: Sample, mixture: Mixture, x: Tensor) -> Tensor:
        """Count the tokens that enter a mixture, and return which of them are not padding."""
        keep = torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
        if sample.masks:
            mask = fitting_mask(sample.masks, mixture.name, x)
            keep = keep if mask is None else mask.keep.flatten().to(x.device)
            self.padding_counted |= {mixture.name} if mask is None else set()
        self._sums[mixture.name][1, -1] += int(keep.sum())
        return keep


class _Unknown(Exception):
    """The arguments or the output of experts are not of a known form."""


Real = Callable[[Tensor], Tensor]


def _from_indices(experts: nn.Module, args: Any, kwargs: Any, output: Tensor, real: Real) -> _Added:
    """Read a module that gets the tokens, the indices of their experts, and the gates with the shape of the indices.

    For each column of the indices alone, it returns what one expert adds for each token.
    """
    given = tensors_within((args, kwargs))
    indices = next(tensor for tensor in given if not tensor.is_floating_point())
    if not any(tensor.shape == indices.shape and tensor.is_floating_point() for tensor in given):
        raise _Unknown("no argument has a gate for each index of an expert")

    def column(value: Any, index: int) -> Any:
        has_columns = isinstance(value, Tensor) and value.shape == indices.shape
        return value[..., index : index + 1] if has_columns else value

    added = []
    for index in range(indices.shape[-1]):
        arguments = {key: column(value, index) for key, value in kwargs.items()}
        added.append(experts.forward(*(column(value, index) for value in args), **arguments))
    total = sum(added)
    error, size = (torch.linalg.vector_norm(each.float()) for each in (total - output, output))
    if error > 0.05 * size:  # False for NaN, which is refused later
        raise _Unknown("its output is not the sum over the experts of a token")
    norms = torch.stack([torch.linalg.vector_norm(each.float(), dim=-1).flatten() for each in added], dim=1)
    routed = real(given[0])[:, None].expand_as(norms)
    return _Added(norms.flatten(), indices.flatten(), routed.flatten())


def _from_slabs(mixture: Mixture, x: Tensor, output: Tensor, real: Real) -> _Added:
    """Read a module that gets all tokens once for each expert: zeros where they are not routed to it."""
    if len(x) % mixture.number or x.ndim != 2 or x.shape != output.shape:
        raise _Unknown(f"its experts get {tuple(x.shape)} and return {tuple(output.shape)}")
    inputs, outputs = (tensor.unflatten(0, (mixture.number, -1)) for tensor in (x, output))
    norms = torch.linalg.vector_norm(outputs.float(), dim=-1)
    routed = inputs.any(dim=-1) & real(inputs[0])
    experts = torch.arange(mixture.number, device=x.device)[:, None].expand_as(norms)
    return _Added(norms.flatten(), experts.flatten(), routed.flatten())


def _from_list(mixture: Mixture, args: Any, kwargs: Any, real: Real) -> _Added:
    """Read experts that are modules: the gate of what one returns is the derivative of the output by it."""
    returned: list[tuple[int, Tensor]] = []

    def detach(index: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        returned.append((index, output.detach().requires_grad_()))
        return returned[-1][1]

    with torch.enable_grad(), ExitStack() as hooks:
        for index, expert in enumerate(mixture.experts.children()):
            hooks.callback(expert.register_forward_hook(partial(detach, index)).remove)
        args, kwargs = clone_arguments((args, kwargs))
        result = tensors_within(mixture.module.forward(*args, **kwargs))[0]
        keep = real(result)
        total = result.flatten(0, -2)[keep].sum()
        slopes = torch.autograd.grad(total, [y for _, y in returned], allow_unused=True)
    norms, experts, routed = [], [], []
    for (index, y), slope in zip(returned, slopes, strict=True):
        gates = torch.zeros_like(y) if slope is None else slope
        if not torch.allclose(gates, gates[..., :1].expand_as(gates), rtol=1e-2):
            raise _Unknown("its output is not the sum of the experts' outputs times gates")
        norms.append((gates[..., 0].float() * torch.linalg.vector_norm(y.detach().float(), dim=-1)).abs().flatten())
        experts.append(torch.full_like(norms[-1], index, dtype=torch.long))
        routed.append(gates[..., 0].flatten() != 0)
    return _Added(torch.cat(norms), torch.cat(experts), torch.cat(routed))
