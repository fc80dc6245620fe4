"""Compare lockstep with plain forward passes: a model may keep something of one batch that the next one changes.

The batches of a lockstep share the modules of the model, with their attributes and buffers, and whatever else its code
writes to. A plain pass has them to itself. Instead of keeping all of that apart for each batch, this file runs two
samples in both ways and compares what reaches each stop.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from wanda_lightning.calibration.lockstep import lockstep, run_to_head
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.models import Stop, has_hooks

# Their models were all compared, see docs/design.md.
_TESTED = {"torch", "transformers", "timm", "torchvision", "sentence_transformers"}

_TOLERANCE = 1e-5  # relative: kernels that add in no fixed order may differ by rounding

_Inputs = dict[tuple[int, int], list[Tensor]]
"""Two sums over each tensor that reached a stop, by the indices of the batch and of the stop."""


def may_keep_state(model: Module) -> bool:
    """Whether the model runs code that is not of a library whose families are all tested."""
    return any(
        has_hooks(module) or type(module).__module__.partition(".")[0] not in _TESTED
        for module in model.modules()
    )


def rehearse_samples(
    model: Module,
    stops: Sequence[Stop],
    samples: Samples,
    batches: Sequence[Sample],
    compares: bool,
) -> int:
    """Run a sample of the first batch; or compare one of each batch with lockstep, and return as `differing_stop` does.

    Batches whose samples do not run alone run whole.
    """

    def run(parts: Sequence[Sample]) -> int:
        if compares:
            return differing_stop(stops, parts)
        for part in parts[:1]:
            run_to_head(model, part)
        return len(stops)

    try:
        return run([samples.first_of(batch) for batch in batches])
    except Exception:  # the code of a model may raise anything
        return run(batches)


@torch.no_grad()
def differing_stop(stops: Sequence[Stop], samples: Sequence[Sample]) -> int:
    """Return the index of a stop that other inputs reach in lockstep than in plain passes; `len(stops)` for none.

    Nothing is pruned in between. In lockstep, each module at a stop runs twice, as it does when it is first observed.
    """
    plain: _Inputs = defaultdict(list)
    for sample in samples:
        with ExitStack() as restored:
            for index, stop in enumerate(stops):
                module = stop.module
                assert module is not None
                record = partial(_record, plain[sample.batch_index, index])
                hook = module.register_forward_pre_hook(record, with_kwargs=True)
                restored.enter_context(hook)
            sample.forward()

    together: _Inputs = defaultdict(list)
    for stop, calls in lockstep(stops, samples, to_end=True):
        for call in calls:
            together[call.sample.batch_index, stops.index(stop)] += _sums(call.args, call.kwargs)
            call.run(on_copies=True)

    for place, sums in plain.items():
        if not _are_equal(sums, together[place]):
            return place[1]
    return len(stops)


def explain(stop: Stop) -> str:
    """Say, in the middle of a sentence, why samples cannot wait for each other."""
    return (
        f"when batches wait for each other, {stop.name or 'the model'} gets other inputs than in a plain forward pass, "
        "since the model keeps something of the batch that ran last"
    )


def _record(seen: list[Tensor], module: Module, args: Any, kwargs: Any) -> None:
    seen.extend(_sums(args, kwargs))


def _sums(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the sum and the sum of absolute values of each tensor."""
    wide = [tensor.double() for tensor in tensors_within((args, kwargs))]
    return [torch.stack((tensor.sum(), tensor.abs().sum())) for tensor in wide]


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether what both hold is equal: a sample may also wait where another module multiplies by the same weight."""
    return all(
        bool((one - other).abs().max() <= _TOLERANCE * one[1])
        for one, other in zip(some, others, strict=False)
    )
