"""Measure how much each expert of a mixture contributes to its output, and make experts unroutable.

What an expert adds for a token is its output times its gate. The saliency of an expert is the sum of the norms of this
over all tokens; REAP (Lasby et al. 2025, arXiv 2510.13999) takes their mean over the tokens that are routed to the
expert. Where a model multiplies the input of the experts by the gate (Llama 4), the norm is that of what the expert
returns for that input.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.interception import PRODUCTS
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.observer import Observation, StopObserver
from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.surroundings import Surroundings
from wanda_lightning.calibration.trees import clone_arguments, tensors_within
from wanda_lightning.common.aliases import Forward
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.types import Units
from wanda_lightning.experts.mixtures import Mixture
from wanda_lightning.models import Stop, fitting_mask
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

_LARGEST_ERROR = 0.05  # of the sum over the experts, relative to the output of the mixture


class ExpertSaliency(StopObserver):
    """Sums up the norms of what the experts of some mixtures add, over the tokens of all batches except padding."""

    def __init__(
        self,
        mixtures: Sequence[Mixture],
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        super().__init__(processes)
        # The number of experts to which this process routes the first token, by mixture.
        self.experts_per_token: dict[str, int] = {}
        self.first_calls: dict[str, Call] = {}  # of each mixture in this process
        # Mixtures where the masks do not show which tokens are padding.
        self.padding_counted: set[str] = set()
        self._mixtures = mixtures
        # The sum of the norms and the number of tokens, (2, experts), by mixture.
        self._sums = {
            mixture.name: torch.zeros(2, mixture.number, dtype=torch.float64)
            for mixture in mixtures
        }

    @contextmanager
    def collect(self, stop: Stop, sample: Sample) -> Iterator[None]:
        """Sum what the experts add while a sample runs in this block."""
        with ExitStack() as hooks:
            for mixture in self._mixtures:
                keep_first = partial(self._keep_first_call, sample, mixture.name)
                read = partial(self._read, sample, mixture)
                hooks.enter_context(
                    mixture.module.register_forward_pre_hook(keep_first, with_kwargs=True)
                )
                hooks.enter_context(mixture.experts.register_forward_hook(read, with_kwargs=True))
            yield

    def finish(self, stop: Stop) -> Observation:
        """Sum what the experts of a stop add over all processes. There are no statistics of inputs to return."""
        modules = {layer.module for layer in stop.layers}
        here = [mixture for mixture in self._mixtures if mixture.experts in modules]
        self.processes.all_reduce_sum([self._sums[mixture.name] for mixture in here])
        return Observation()

    def tokens(self, mixture: Mixture) -> Tensor:
        """Return the number of tokens that were routed to each expert."""
        return self._sums[mixture.name][1]

    def of(self, mixture: Mixture) -> Tensor:
        """Return the saliency of each expert, in float64; 0 for experts without tokens.

        Sums are divided by the number of tokens of all experts, so that they do not grow with the data.
        """
        norms, tokens = self._sums[mixture.name]
        return norms / tokens.sum().clamp(min=1)

    def _keep_first_call(
        self, sample: Sample, name: str, module: Module, args: Any, kwargs: Any
    ) -> None:
        if name not in self.first_calls:
            args, kwargs = clone_arguments((args, kwargs))
            surroundings = Surroundings.present()
            call = Call(sample, name, module.forward, args, kwargs, surroundings)
            self.first_calls[name] = call

    def _read(
        self,
        sample: Sample,
        mixture: Mixture,
        module: Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        try:
            routing = _routing(mixture, module, args, kwargs, output)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise UserError(
                f"experts= must see what each expert adds to the output, but {mixture.name} "
                f"({type(mixture.module).__name__}) does not show it: {error}. Use prune, which makes zeros."
            ) from error

        routed = routing.routed
        self.experts_per_token.setdefault(mixture.name, int(routed[:1].sum()))
        mask = fitting_mask(sample.masks, mixture.name, routing.tokens)
        if mask:
            routed = routed & mask.keep.flatten().to(routed.device)[:, None]
        elif sample.masks:
            self.padding_counted.add(mixture.name)

        norms = routing.norms[routed].cpu().double()
        experts = routing.experts.reshape(routed.shape)[routed].cpu()
        sums = self._sums[mixture.name]
        sums[0].index_add_(0, experts, norms)
        sums[1].index_add_(0, experts, torch.ones(len(experts), dtype=torch.float64))


class _Routing(NamedTuple):
    """The contribution of each token's experts to the output of a mixture; each tensor has the shape (tokens, k)."""

    tokens: Tensor  # the inputs, (tokens, d_in)
    experts: Tensor  # indices
    norms: Tensor  # of what the expert adds for the token
    routed: Tensor  # whether the token is routed to the expert


def _routing(mixture: Mixture, module: Module, args: Any, kwargs: Any, output: Tensor) -> _Routing:
    """Return which experts the tokens of a call are routed to, and what these add.

    Raises:
        ValueError: If the arguments do not show it.
    """
    tokens, *others = tensors_within((args, kwargs))
    indices = next((tensor for tensor in others if not tensor.is_floating_point()), None)
    if indices is not None:
        norms = _from_indices(module, args, kwargs, output, indices)
        return _Routing(tokens, indices, norms, torch.ones_like(norms, dtype=torch.bool))

    # All tokens once for each expert, zeros where they are not routed to it.
    if others or tokens.ndim != 2 or tokens.shape != output.shape:
        raise ValueError(f"its experts get {tuple(tokens.shape)} and no indices")
    inputs = tokens.unflatten(0, (mixture.number, -1))
    outputs = output.unflatten(0, (mixture.number, -1))
    norms = vector_norm(outputs.float(), dim=-1).T
    experts = torch.arange(mixture.number, device=tokens.device).expand_as(norms)
    return _Routing(inputs[0], experts, norms, inputs.any(dim=-1).T)


def _from_indices(
    experts: Module, args: Any, kwargs: Any, output: Tensor, indices: Tensor
) -> Tensor:
    """Return the norms (tokens, k) of what k experts add for each token.

    The experts get the indices of each token's experts, and gates with the same shape. Called with one column of both,
    they return what one expert adds for each token.
    """
    has_gates = any(
        tensor.shape == indices.shape and tensor.is_floating_point()
        for tensor in tensors_within((args, kwargs))
    )
    if not has_gates:
        raise ValueError("no argument has a gate for each index of an expert")

    def column(value: Any, index: int) -> Any:
        if isinstance(value, Tensor) and value.shape == indices.shape:
            return value[..., index : index + 1]
        return value

    added = []
    for index in range(indices.shape[-1]):
        positional = [column(value, index) for value in args]
        keywords = {key: column(value, index) for key, value in kwargs.items()}
        added.append(experts.forward(*positional, **keywords))

    error = vector_norm((sum(added) - output).float())
    size = vector_norm(output.float())
    if error > _LARGEST_ERROR * size:  # False for NaN, which is refused later
        raise ValueError("its output is not the sum over the experts of a token")
    norms = [vector_norm(each.float(), dim=-1).flatten() for each in added]
    return torch.stack(norms, dim=1)


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

    def run(forward: Forward, *args: Any, **kwargs: Any) -> Any:
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
