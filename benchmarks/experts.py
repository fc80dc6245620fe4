r"""Take experts out of a mixture: by REAP's score, by the loss, by how often they are used, by norms, and at random.

    python recipes/llm/small_mixture.py --output out/small_mixture
    python benchmarks/experts.py --model out/small_mixture --calibration out/small_mixture_text/training.txt \
        --eval out/small_mixture_text/heldout.txt --seqlen 256 --nsamples 64 --limit 256 --save benchmarks/results

The same with `--steps 600`, `out/small_mixture_600` and `--limit 128` measures a mixture with a shorter training.

REAP's score and the loss are repeated with three draws of the calibration windows. The script also prunes half of the
weights with Wanda and SparseGPT, with all windows and with two. With two, experts with fewer than 32 tokens are pruned
with the statistics of all experts of their layer, or only those without any token.
"""

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from measuring import LanguageModel, Text, fingerprint, in_batches, run_from_shell
from result import Runs

from wanda_lightning import prune
from wanda_lightning.calibration import observer
from wanda_lightning.core.losses import row_divergences
from wanda_lightning.experts.mixtures import mixtures
from wanda_lightning.experts.saliency import ExpertSaliency
from wanda_lightning.modules import WindowPerplexity

DRAWS = (0, 1, 2)
GOALS = (0.5, 0.75, 0.25)


def by_the_loss(model, batches):
    """Return a score: the sum over windows of the squared first-order effect of an expert on the loss.

    Each expert's gate is multiplied by a variable that is 1, one for each expert. The derivative of a window's loss by
    that variable is how much the loss changes, to first order, for each unit of the expert's output that is taken away.
    """
    effects = {}
    model.requires_grad_(False)
    for batch in batches:
        for window in batch["input_ids"].split(1):
            scales = {}
            with ExitStack() as hooks:
                for mixture in mixtures(model):
                    scale = torch.ones(mixture.number, requires_grad=True)
                    scales[mixture.name] = scale
                    hook = mixture.experts.register_forward_pre_hook(partial(scaled, scale))
                    hooks.callback(hook.remove)
                loss = model(
                    window, labels=window, use_cache=False, output_router_logits=False
                ).loss
                gradients = torch.autograd.grad(loss, list(scales.values()))
            for name, gradient in zip(scales, gradients, strict=True):
                effects[name] = effects.get(name, 0) + gradient.double().square()
    return lambda _, mixture: effects[mixture.name]


def scaled(scale, _, arguments):
    """Multiply the gates of each token by the variables of its experts."""
    tokens, indices, gates = arguments
    return tokens, indices, gates * scale[indices]


def by_norm(_, mixture):
    """Return the squared norm of all weights of each expert."""
    norms = torch.zeros(mixture.number, dtype=torch.float64)
    for weight in mixture.experts.parameters():
        norms += weight.double().square().flatten(1).sum(1)
    return norms


def at_random(seed):
    """Return a random score."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, mixture: torch.rand(mixture.number, generator=generator, dtype=torch.float64)


@torch.no_grad()
def compared(model, batches, dense=None):
    """Return the perplexity and the mean KL divergence from the dense logits, and the logits."""
    metric = WindowPerplexity()
    logits = []
    divergences = []
    for number, batch in enumerate(batches):
        logits.append(model(**batch, use_cache=False).logits)
        metric.update(logits[-1], batch["input_ids"])
        if dense:
            rows = [each.flatten(0, 1) for each in (logits[-1], dense[number])]
            divergences.append(row_divergences(*rows))
            logits[-1] = None
    measured = {"perplexity": float(metric.compute())}
    if dense:
        measured["divergence"] = float(torch.cat(divergences).mean())
    return measured, logits


def main(options: Text, save: str = ""):
    """Measure all rows."""
    runs = Runs(save, "experts")
    for draw in DRAWS:
        language = LanguageModel(options, draw)
        dense = language.model
        case = {"weights": fingerprint(dense), "draw": draw}
        planned = replace(language.planned, case=case)
        evaluation = language.evaluation
        result, logits = compared(dense, evaluation)

        def measure(row, patched, language=language, dense=dense, logits=logits):
            """Prune a copy while something is patched."""
            model = copy.deepcopy(dense)
            windows = language.data.calibration_windows[: row.calibration.windows]
            choices = {"pattern": row.pattern, **row.arguments}
            with patched:
                prune(model, in_batches(windows), row.sparsity, **choices, progress=False)
            measured, _ = compared(model, language.evaluation, logits)
            return measured

        usual = ExpertSaliency.of
        reap = {"pattern": "experts_reap"}
        scores = {
            "REAP": (usual, reap),
            "REAP, block after block": (usual, {"sequential": "block", **reap}),
            "REAP, sum": (usual, {}),
            "loss": (by_the_loss(copy.deepcopy(dense), language.calibration), {}),
        }
        if draw == 0:
            runs(planned, lambda result=result: result)
            scores["uses"] = (ExpertSaliency.tokens, {})
            scores["norms"] = (by_norm, {})
            scores |= {f"random, seed {seed}": (at_random(seed), {}) for seed in range(3)}
        for goal, (name, (score, arguments)) in product(GOALS, scores.items()):
            row = replace(
                planned, method=name, sparsity=goal, pattern="experts", arguments=arguments
            )
            runs(row, partial(measure, row, patch.object(ExpertSaliency, "of", score)))
        if draw == 0:
            weights(runs, planned, options.nsamples, measure)


def weights(runs, planned, samples, measure):
    """Prune half of the weights, with all windows and with two."""
    # Experts with fewer tokens than this are pruned with the statistics of all experts of their layer.
    enough = observer.MIN_EXPERT_TOKENS
    cases = (
        ("", samples, enough),
        (", 2 windows", 2, enough),
        (", 2 windows, each expert alone", 2, 1),
    )
    for method, (case, windows, min_tokens) in product(("wanda", "sparsegpt"), cases):
        row = replace(
            planned,
            method=f"{method}{case}",
            sparsity=0.5,
            arguments={"method": method},
            calibration=replace(planned.calibration, windows=windows),
        )
        patched = patch.object(observer, "MIN_EXPERT_TOKENS", min_tokens)
        runs(row, partial(measure, row, patched))


if __name__ == "__main__":
    run_from_shell(main)
