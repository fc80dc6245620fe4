"""Variants of `best` and `thorough` on a language model, most of which did not pay (docs/tried.md).

    python benchmarks/tried_text.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --goal 2:4 --variants dense best squared token_factors later_outputs_0
    python benchmarks/tried_text.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --goal 70 --variants best uniform deviation_0.15 deviation_0.075

Each variant prunes the dense model. A line has the variant, the goal, the perplexity on 20 windows of the calibration
text that calibration does not use, the perplexity on 40 windows of `--eval`, and the processor seconds. Variants that
first prune and then train print a line for each stage, with the seconds of that stage. All methods of
benchmarks/quality.py are variants, too. `later_outputs_*`, `heads` and `units` need the modules of a Llama.
"""

import argparse
import copy
import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from quality import TEXT, UNSTRUCTURED, Choices, LanguageModel, choices, in_batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import wanda_lightning as wl
from wanda_lightning.calibration import gradients
from wanda_lightning.calibration.interception import Product
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.reader import BatchReader
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.core.allocation import fisher
from wanda_lightning.core.criteria import lower_inactive
from wanda_lightning.core.masking import masked
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.refit import refit_columns
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.engine import write
from wanda_lightning.engine.plan import Plan, make_plan
from wanda_lightning.models import Layer, Unit
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.training import distil
from wanda_lightning.training.recovery import DenseModel, UnitRecovery

HELD_OUT, EVALUATED = 20, 40  # windows to measure on
DEVIATION = r"deviation_(0?\.\d+)"  # the largest difference between a layer's sparsity and the goal
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layers with the same input


class Study(LanguageModel):
    """A model, its windows, and the clock of the present variant."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(argparse.Namespace(**vars(options), held_out=True, draw=None, limit=HELD_OUT))
        data = wl.TextDataModule(self.tokenizer, evaluation=options.eval, seqlen=options.seqlen, limit=EVALUATED)
        self.texts["--eval"] = in_batches(data.evaluation_windows)
        self.goal, self.variant, self.started = options.goal, "", 0.0

    def start(self, variant: str) -> None:
        """Restore the dense weights, and start the clock."""
        self.model.load_state_dict(self.dense)
        self.variant, self.started = variant, time.process_time()

    def report(self, stage: str = "") -> None:
        """Print the results since the last report, and start the clock again."""
        duration = time.process_time() - self.started
        held_out, evaluated = self.measure_perplexity().values()
        goal = "-" if self.variant in WITHOUT_GOAL else self.goal
        measured = f"held out {held_out:.2f}, --eval {evaluated:.2f}, {duration:.1f} s"
        print(f"{self.variant}{stage}, {goal}: {measured}", flush=True)
        self.started = time.process_time()

    def plan_for(self, method: str) -> Plan:
        """Plan how to prune the model."""
        return make_plan(wl.PruningConfig.from_names(**choices({"method": method}, self.goal)), self.model)

    def drawn_labels(self) -> Iterator[None]:
        """Pass one window after another backward, with labels that are drawn from the predictions."""
        for index, window in enumerate(self.samples):
            logits = self.model(window[None], use_cache=False).logits[0]
            generator = torch.Generator().manual_seed(index)
            labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator).squeeze(1)
            cross_entropy(logits, labels, reduction="sum").backward()
            yield
            self.model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class SquaredAssignment(wl.Assignment):
    """Choose the permutation by the squares of the scores."""

    def __call__(self, scores: Tensor, pattern: Pattern) -> Tensor:
        """Return the order of the columns."""
        return super().__call__(scores.float().square(), pattern)


@dataclass(frozen=True)
class ReconstructAndDistil(wl.Distil):
    """Train each block after it is pruned, and the whole model at the end; with `sequential="block"`."""

    def start(self, unit: Unit, processes: Processes = SINGLE_PROCESS) -> UnitRecovery:
        """Start to train a block."""
        return wl.Reconstruct().start(unit, processes)


@contextmanager
def token_factors(study: Study, share: float = 0.5, most: float = math.inf) -> Iterator[None]:
    """Multiply the tokens in all statistics by factors from gradients (GuidedQuant, Kim et al. 2025).

    A factor is `1 - share + share * g`. Here g is the squared gradient at the outputs of the layer, relative to its
    mean over all tokens, at most `most`, and then divided by its mean over the batch.
    """
    squares: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        found = squares.setdefault(name, [])
        output.register_hook(lambda gradient: found.append(gradient.square().mean(dim=-1).flatten()))

    hooks = [layer.module.register_forward_hook(partial(watch, layer.name)) for layer in study.plan_for("best").layers]
    for _ in study.drawn_labels():
        pass
    for hook in hooks:
        hook.remove()
    totals: dict[str, Tensor] = {}
    for name, windows in squares.items():
        total = torch.stack(windows)
        totals[first_reader(name)] = totals.get(first_reader(name), 0) + total / total.mean()
    batches = {name: (total / total.mean()).clamp(max=most).split(4) for name, total in totals.items()}

    def read_tokens(self: Any, product: Product, has_padding: bool) -> None:
        g = batches[first_reader(product.layer.name)][self._batch].reshape(-1, 1)
        root = (1 - share + share * g / g.mean()).sqrt()
        with patch.object(InputStatistics, "update", lambda sums, tokens: update(sums, tokens * root)):
            read(self, product, has_padding)

    read, update = BatchReader._read_tokens, InputStatistics.update
    with patch.object(BatchReader, "_read_tokens", read_tokens):
        yield


def first_reader(name: str) -> str:
    """Return the first of the layers of a Llama that have the same input as this one."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{SHARED.get(last, last)}"


@contextmanager
def row_fisher(study: Study) -> Iterator[None]:
    """Let `ADMM` use an estimate of the Fisher matrix of each row, too (MOONSHOT, Afriat et al. 2026)."""
    layers, found, names = study.plan_for("balanced").layers, dict[str, list[Tensor]](), list[str]()
    for _ in study.drawn_labels():
        for layer in layers:
            assert layer.parameter.grad is not None
            found.setdefault(layer.name, []).append(layer.parameter.grad.bfloat16())

    def prune_layers(run: Any, layers: Sequence[Layer], inputs: InputStatistics) -> Iterator[Any]:
        names[:] = [layer.name for layer in layers]
        yield from prune_layers_of(run, layers, inputs)

    def solve_together(self: wl.ADMM, weights: Any, inputs: InputStatistics, selections: Any) -> list[Any]:
        each = zip(weights, selections, names, strict=True)
        return [solve_by_rows(self, weight, inputs, selection, found[name]) for weight, selection, name in each]

    prune_layers_of = write._prune_layers
    with patch.object(write, "_prune_layers", prune_layers), patch.object(wl.ADMM, "solve_together", solve_together):
        yield


def solve_by_rows(
    solver: wl.ADMM, weight: Tensor, inputs: InputStatistics, selection: Selection, found: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Solve a layer like `ADMM`, with the average of the Gram matrix and an estimate of the Fisher matrix of each row.

    `found` has the gradient of the weight for each window. The diagonals of both have a mean of 1 over the layer.
    """
    scale, gram = inputs.scaled_gram(solver.dampening)
    gram, energy, alive = gram / 2, inputs.sums["gram"].diagonal(), weight != 0
    dense = weight.to(gram.dtype) * scale
    roots = torch.stack([gradient.to(gram.dtype) / scale for gradient in found], dim=2)  # (rows, inputs, windows)
    roots *= (0.5 / roots.square().sum(dim=2).mean()).sqrt()
    rows, width, windows = roots.shape

    def curvature(x: Tensor) -> Tensor:
        return x @ gram + torch.einsum("rdn,rn->rd", roots, torch.einsum("rdn,rd->rn", roots, x))

    def choose(scores: Tensor) -> Tensor:
        return selection.choose(lower_inactive(scores * alive, weight, energy)) & alive

    rho, last = solver.rho
    growth = (last / rho) ** (1 / (solver.iterations - 1))
    target, keep = curvature(dense), choose(dense.abs())
    total, dual = masked(dense, keep), torch.zeros_like(dense)
    for _ in range(solver.iterations):
        lower = torch.linalg.cholesky(gram + rho * torch.eye(width))
        fit = torch.cholesky_solve((target + rho * total - rho * (1 + 1 / growth) * dual).t(), lower).t()
        # The inverse for each row, by the Woodbury identity
        solved = torch.cholesky_solve(roots.permute(1, 0, 2).reshape(width, rows * windows), lower)
        solved = solved.reshape(width, rows, windows).permute(1, 0, 2)
        small = torch.eye(windows) + roots.mT @ solved
        total = fit - (solved @ torch.linalg.solve(small, roots.mT @ fit[:, :, None])).squeeze(2) + dual / growth
        keep = choose(total.abs())
        dual, rho = masked(total, ~keep), rho * growth
    fitted, inverse = masked(total, keep), (gram.diagonal() + roots.square().sum(dim=2)).reciprocal()
    residual = masked(curvature(dense - fitted), keep)
    direction = residual * inverse
    norm = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(solver.refit_steps):
        image = curvature(direction)
        step = norm / (direction * image).sum(dim=1, keepdim=True).clamp(min=1e-30)
        fitted, residual = fitted + step * direction, residual - step * masked(image, keep)
        previous, norm = norm, (residual * residual * inverse).sum(dim=1, keepdim=True)
        direction = residual * inverse + norm / previous.clamp(min=1e-30) * direction
    return masked(fitted / scale, keep).to(weight.dtype), keep


@contextmanager
def random_signs(study: Study) -> Iterator[None]:
    """Pass `sqrt(p) * v - p * (sqrt(p) @ v)` backward, with random signs v, instead of `p` minus a drawn label."""
    generator = torch.Generator().manual_seed(0)

    def apply(logits: Tensor, slopes: Tensor) -> Tensor:
        p = logits.detach().softmax(dim=-1)
        signed = p.sqrt() * (torch.randint(2, p.shape, generator=generator) * 2 - 1)
        used = slopes.any(dim=-1, keepdim=True)  # not the windows beyond the limit
        return apply_of(logits, (signed - p * signed.sum(dim=-1, keepdim=True)) * used)

    apply_of: Callable[..., Tensor] = gradients._WithGradient.apply
    with patch.object(gradients._WithGradient, "apply", apply):
        yield


def own_windows(study: Study) -> AbstractContextManager[Any]:
    """Also calibrate on as many windows that the dense model writes."""
    count, seqlen = study.samples.shape
    own = wl.sample_windows(study.model, study.tokenizer, count, seqlen, progress=False)
    return patch.object(study, "calibration", in_batches(torch.cat([study.samples, own])))


class Blocks:
    """The blocks of a Llama, and what enters the first one for each window."""

    def __init__(self, study: Study) -> None:
        self.modules: Sequence[Any] = study.model.model.layers
        self.states: list[Tensor] = []
        self.arguments: dict[str, Any] = {}  # further arguments, equal for all windows and blocks
        hook = self.modules[0].register_forward_pre_hook(self._record, with_kwargs=True)
        with torch.no_grad(), patch.object(study.model.config, "num_hidden_layers", 1):  # to save time
            for window in study.samples:
                study.model.model(window[None], use_cache=False)
        hook.remove()

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self.states.append(args[0])
        self.arguments = kwargs

    @torch.no_grad()
    def run(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of a block for all windows."""
        return [self.modules[index](state, **self.arguments) for state in states]


def best_then_distil(study: Study, later: int | None = None) -> None:
    """Prune with `best`, train each block for the dense output of a later one (or not at all), then distill.

    With SNOWS (Lucas and Mazumder 2025), the later blocks are still dense while a block is trained.
    """
    study.prune(choices({"method": "best"}, study.goal))
    study.report(" (best)")
    if later is not None:
        pruned = [copy.deepcopy(block.state_dict()) for block in study.model.model.layers]
        study.model.load_state_dict(study.dense)
        blocks = Blocks(study)
        states, targets = blocks.states, [blocks.states]
        for index in range(len(pruned)):
            targets.append(blocks.run(index, targets[-1]))
        for index, weights in enumerate(pruned):
            last = min(index + later, len(pruned) - 1)
            blocks.modules[index].load_state_dict(weights)
            train_block(blocks, range(index, last + 1), states, targets[last + 1])
            states = blocks.run(index, states)
        study.report(" (blocks trained)")
    trained = copy.deepcopy(study.model.state_dict())
    study.model.load_state_dict(study.dense)
    plan = study.plan_for("best")
    samples = Samples(study.model, study.calibration, None, None, SINGLE_PROCESS, "batches")
    with pruning_mode(study.model):
        run = wl.Distil().start_model(DenseModel(study.model, plan.layers, plan.blocks, samples, SINGLE_PROCESS, False))
        study.model.load_state_dict(trained)
        run.train()


def train_block(blocks: Blocks, chain: range, states: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Train the kept weights of the first block of a chain for the outputs of the last.

    Adam makes two passes. Every eighth window is held out, and the weights with the lowest error on these are kept.
    """
    epochs, rate = 2, 0.005
    weights = [weight for weight in blocks.modules[chain[0]].parameters() if weight.ndim == 2]
    keep = [weight.detach() != 0 for weight in weights]
    trained = [window for window in range(len(states)) if window % 8 != 7]

    def error(window: int) -> Tensor:
        state = states[window]
        for index in chain:
            state = blocks.modules[index](state, **blocks.arguments)
        return (state - targets[window]).square().sum() / targets[window].square().sum()

    @torch.no_grad()
    def held_out_error() -> float:
        return float(sum(error(window) for window in range(7, len(states), 8)))

    sizes = [float(weight.detach()[kept].square().mean().sqrt()) for weight, kept in zip(weights, keep, strict=True)]
    groups = [{"params": [weight], "lr": rate * size} for weight, size in zip(weights, sizes, strict=True)]
    optimizer, steps = torch.optim.Adam(groups, betas=(0.9, 0.95)), epochs * len(trained)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    least, best = held_out_error(), [weight.detach().clone() for weight in weights]
    for epoch in range(epochs):
        for number in torch.randperm(len(trained), generator=torch.Generator().manual_seed(epoch)).tolist():
            slopes = torch.autograd.grad(error(trained[number]), weights)
            for weight, kept, slope in zip(weights, keep, slopes, strict=True):
                weight.grad = slope * kept
            optimizer.step()
            schedule.step()
        if (after := held_out_error()) < least or len(trained) == len(states):
            least, best = after, [weight.detach().clone() for weight in weights]
    optimizer.zero_grad()
    with torch.no_grad():
        for weight, value in zip(weights, best, strict=True):
            weight.copy_(value)


@torch.no_grad()
def take_out(study: Study, reader_name: str) -> None:
    """In each block, set the units with the smallest squared scores to zero, and refit the layer that reads them.

    Attention loses one key-value group, or the MLP as many parameters in hidden units. The statistics come from the
    model whose earlier blocks are pruned.
    """
    blocks = Blocks(study)
    states = blocks.states
    for index, block in enumerate(blocks.modules):
        reader, inputs = block.get_submodule(reader_name), InputStatistics({"gram", "square_sum"})
        hook = reader.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.update(args[0].flatten(0, -2)))
        blocks.run(index, states)
        hook.remove()
        size = block.self_attn.head_dim
        width, count = size * block.self_attn.num_key_value_groups, 1
        if reader is not block.self_attn.o_proj:
            width, count = 1, round((2 * width + 2 * size) / 3)  # as many rows and columns as a group of heads
        scores = wl.Wanda()(reader.weight, inputs).square().sum(dim=0).unflatten(0, (-1, width)).sum(dim=1)
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[scores.topk(count, largest=False).indices] = False
        keep = keep.repeat_interleave(width)
        reader.weight.copy_(refit_columns(reader.weight, keep, inputs.sums["gram"], wl.Refit().dampening))
        states = blocks.run(index, states)


VARIANTS: Mapping[str, Choices] = {
    **TEXT,
    "squared": {"method": "best", "permutation": SquaredAssignment()},
    "block": {"method": "best", "sequential": "block"},
    "uniform": {"method": "best", "allocation": "uniform"},
    "half_rate": {"method": "thorough", "recovery": wl.Distil(learning_rate=0.0005)},
    "twice_rate": {"method": "thorough", "recovery": wl.Distil(learning_rate=0.002)},
    "warm_up_12": {"method": "thorough"},
    "passes_4": {"method": "thorough", "recovery": wl.Distil(passes=4)},
    "reconstruct_first": {"method": "thorough", "recovery": ReconstructAndDistil(), "sequential": "block"},
    "reconstruct_first_2": {"method": "thorough", "recovery": ReconstructAndDistil(passes=2), "sequential": "block"},
    "reconstruct_first_steps_1": {"method": "thorough", "recovery": ReconstructAndDistil(), "sequential": "block"},
    "token_factors": {"method": "best"},
    "token_factors_balanced": {"method": "balanced"},
    "raw_token_factors_balanced": {"method": "balanced"},
    "balanced_10": {"method": "balanced", "solver": wl.ADMM(iterations=10)},
    "row_fisher": {"method": "balanced", "solver": wl.ADMM(iterations=10)},
    "own_windows": {"method": "thorough"},
    "random_signs": {"method": "best"},
}
CHANGES: Mapping[str, Callable[[Study], AbstractContextManager[Any]]] = {  # while the variant of this name prunes
    "reconstruct_first_steps_1": lambda study: patch.object(
        study, "calibration", [{"input_ids": window} for window in study.samples.split(1)]
    ),
    "warm_up_12": lambda study: patch.object(distil, "_WARM_UP", 12),
    "token_factors": token_factors,
    "token_factors_balanced": token_factors,
    "raw_token_factors_balanced": partial(token_factors, share=1.0, most=10.0),
    "row_fisher": row_fisher,
    "own_windows": own_windows,
    "random_signs": random_signs,
}
OTHERS: Mapping[str, Callable[[Study], None]] = {  # more or less than one call of `prune`
    "dense": lambda study: None,
    "best_then_distil": best_then_distil,
    **{f"later_outputs_{later}": partial(best_then_distil, later=later) for later in range(3)},
    "heads": partial(take_out, reader_name="self_attn.o_proj"),
    "units": partial(take_out, reader_name="mlp.down_proj"),
}
WITHOUT_GOAL = ("dense", "heads", "units")
FOR_PERCENTAGES = (*UNSTRUCTURED, "uniform", "random_signs")  # with N:M, they change nothing or mix patterns


def variant_of(name: str) -> tuple[Choices, Callable[[Study], AbstractContextManager[Any]]]:
    """Return the arguments of `prune` for a variant, and a context in which it prunes."""
    if found := re.fullmatch(DEVIATION, name):
        allocation = wl.Fisher(float(found[1]), num_samples=8, num_predictions=4096)
        return {"method": "best", "allocation": allocation}, lambda study: patch.object(fisher, "_MOST_OF_KEPT", 1.0)
    return VARIANTS[name], CHANGES.get(name, lambda study: nullcontext())


def main() -> None:
    """Measure the variants, one after another."""
    parser = argparse.ArgumentParser(description="Variants of best and thorough on a language model.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--calibration", required=True, help="a text (.txt)")
    parser.add_argument("--eval", required=True)
    parser.add_argument("--goal", default="2:4", help="percentage for unstructured pruning, or N:M")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--variants", nargs="+", default=["dense", "best", "thorough"])
    options = parser.parse_args()
    known = [*VARIANTS, *OTHERS]
    if unknown := [name for name in options.variants if name not in known and not re.fullmatch(DEVIATION, name)]:
        parser.error(f"--variants must be from: {shlex.join(known)}, deviation_0.15; but {unknown[0]!r} is not.")
    study = Study(options)
    for name in options.variants:
        reason = "" if name in OTHERS else study.refusal(choices(variant_of(name)[0], options.goal))
        if ":" in options.goal and (name in FOR_PERCENTAGES or re.fullmatch(DEVIATION, name)):
            reason = "N:M has one sparsity for all layers and no row weights"
        if reason:
            parser.error(f"--variants cannot have {name} with --goal {options.goal}: {reason}.")
    for name in options.variants:
        study.start(name)
        if name in OTHERS:
            OTHERS[name](study)
        else:
            chosen, change = variant_of(name)
            with change(study):
                study.prune(choices(chosen, options.goal))
        study.report()


if __name__ == "__main__":
    main()
