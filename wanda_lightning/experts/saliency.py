"""Measure how much each expert of a mixture contributes to its output, and make experts unroutable.

REAP's saliency of an expert (Lasby et al. 2025, arXiv 2510.13999) is the mean, over the tokens that are routed to it,
of its gate times the norm of its output: the norm of what it adds for this token. Where a model multiplies the input of
the experts by the gate (Llama 4), it is the norm of what the expert returns for that input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.interception import PRODUCTS
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.surroundings import Surroundings
from wanda_lightning.calibration.trees import clone_arguments, tensors_within
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.types import Units
from wanda_lightning.experts.mixtures import Mixture
from wanda_lightning.models import fitting_mask
from wanda_lightning.parallel import Processes


class ExpertSaliency:
    """Sums up the norms of what the experts of some mixtures add, over the tokens of all batches except padding."""

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.per_token: dict[
            str, int
        ] = {}  # the number of experts to which this process routes the first token
        self.first: dict[str, Call] = {}  # the first call of each mixture, by its name
        # Mixtures where the masks do not show which tokens are padding.
        self.padding_counted: set[str] = set()
        self._mixtures = mixtures
        # For each expert the sum of the norms and the number of tokens.
        self._sums = {
            each.name: torch.zeros(2, each.number, dtype=torch.float64) for each in mixtures
        }

    def watched(self, call: Call) -> Call:
        """Return a call that also sums what the experts add when it runs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.collect(call.sample):
                return call.forward(*args, **kwargs)

        return replace(call, forward=run)

    @contextmanager
    def collect(self, sample: Sample) -> Iterator[None]:
        """Sum what the experts add while a sample runs in this block."""
        with ExitStack() as hooks:
            for mixture in self._mixtures:
                keep_first = partial(self._keep_first, sample, mixture.name)
                hooks.callback(
                    mixture.module.register_forward_pre_hook(keep_first, with_kwargs=True).remove
                )
                read = partial(self._read, sample, mixture)
                hooks.callback(mixture.experts.register_forward_hook(read, with_kwargs=True).remove)
            yield

    def all_reduce(self, mixtures: Sequence[Mixture], processes: Processes) -> None:
        """Sum over all processes."""
        processes.all_reduce_sum([self._sums[mixture.name] for mixture in mixtures])

    def tokens(self, mixture: Mixture) -> Tensor:
        """Return the number of tokens that were routed to each expert."""
        return self._sums[mixture.name][1]

    def __call__(self, mixture: Mixture) -> Tensor:
        """Return the saliency of each expert, in float64; 0 for experts without tokens."""
        norms, tokens = self._sums[mixture.name]
        return norms / tokens.clamp(min=1)

    def _keep_first(
        self, sample: Sample, name: str, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        if name not in self.first:
            args, kwargs = clone_arguments((args, kwargs))
            self.first[name] = Call(
                sample, name, module.forward, args, kwargs, Surroundings.present()
            )

    def _read(
        self,
        sample: Sample,
        mixture: Mixture,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        x, *others = tensors_within((args, kwargs))
        indices = next((tensor for tensor in others if not tensor.is_floating_point()), None)
        try:
            # All tokens once for each expert, zeros where they are not routed to it.
            if indices is None:
                if others or x.ndim != 2 or x.shape != output.shape:
                    raise ValueError(f"its experts get {tuple(x.shape)} and no indices")
                inputs, outputs = (each.unflatten(0, (mixture.number, -1)) for each in (x, output))
                x = inputs[0]
                routed = inputs.any(dim=-1).T
                norms = torch.linalg.vector_norm(outputs.float(), dim=-1).T
                indices = torch.arange(mixture.number, device=x.device).expand_as(norms)
            else:
                norms = _from_indices(module, args, kwargs, output, indices)
                routed = torch.ones_like(norms, dtype=torch.bool)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise UserError(
                f"pattern='experts' must see what each expert adds to the output, but {mixture.name} "
                f"({type(mixture.module).__name__}) does not show it: {error}. Use pattern='unstructured' or '2:4'."
            ) from error
        self.per_token.setdefault(mixture.name, int(routed[:1].sum()))
        if (mask := fitting_mask(sample.masks, mixture.name, x)) is not None:
            routed = routed & mask.keep.flatten().to(x.device)[:, None]
        elif sample.masks:
            self.padding_counted.add(mixture.name)
        sums = self._sums[mixture.name]
        experts = indices.reshape(norms.shape)[routed].cpu()
        sums[0].index_add_(0, experts, norms[routed].cpu().double())
        sums[1].index_add_(0, experts, torch.ones(len(experts), dtype=torch.float64))


def _from_indices(
    experts: nn.Module, args: Any, kwargs: Any, output: Tensor, indices: Tensor
) -> Tensor:
    """Return the norms (tokens, k) of what k experts add for each token.

    The experts get the indices of each token's experts, and gates with the same shape. Called with one column of both,
    they return what one expert adds for each token.
    """
    if not any(
        each.shape == indices.shape and each.is_floating_point()
        for each in tensors_within((args, kwargs))
    ):
        raise ValueError("no argument has a gate for each index of an expert")

    def column(value: Any, index: int) -> Any:
        has_columns = isinstance(value, Tensor) and value.shape == indices.shape
        return value[..., index : index + 1] if has_columns else value

    added = []
    for index in range(indices.shape[-1]):
        arguments = {key: column(value, index) for key, value in kwargs.items()}
        added.append(experts.forward(*(column(value, index) for value in args), **arguments))
    error, size = (torch.linalg.vector_norm(each.float()) for each in (sum(added) - output, output))
    if error > 0.05 * size:  # False for NaN, which is refused later
        raise ValueError("its output is not the sum over the experts of a token")
    return torch.stack(
        [torch.linalg.vector_norm(each.float(), dim=-1).flatten() for each in added], dim=1
    )


def _lowered(tensor: Tensor, experts: Units) -> Tensor:
    lowest = torch.finfo(tensor.dtype).min / 2  # finite, because a router may multiply it by 0
    return tensor.masked_fill(experts.to(tensor.device), lowest)


class _Lower(TorchFunctionMode):
    """Lower the logits of some experts."""

    def __init__(self, experts: Units) -> None:
        super().__init__()
        self._experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and result.shape[-1] == len(self._experts):
            return _lowered(result, self._experts)
        return result


@contextmanager
def unroutable(mixture: Mixture, experts: Units) -> Iterator[None]:
    """Give these experts the lowest logits and biases in this block, without knowing how the router computes.

    A router multiplies by its rows, and then does whatever its model does: a softmax, a sigmoid, groups, the largest
    few. No hook lies between the two, so a torch-function mode inside the routers replaces the result of the product.
    """

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Lower(experts):
            return forward(*args, **kwargs)

    with ExitStack() as stack:
        for router in mixture.routers:
            stack.enter_context(patched(router, "forward", partial(run, router.forward)))
        for tensor in (slot.tensor.detach() for slot in mixture.slots):
            # For example a bias of the router.
            if tensor.numel() == mixture.number and tensor.is_floating_point():
                stack.callback(tensor.copy_, tensor.clone())
                tensor.copy_(_lowered(tensor.flatten(), experts).view_as(tensor))
        yield
