r"""Take experts out of a mixture: by REAP's score, by how often they are used, by norms, and at random.

    python recipes/llm/small_mixture.py --output out/small_mixture
    python benchmarks/experts.py --model out/small_mixture --calibration out/small_mixture_text/training.txt \
        --eval out/small_mixture_text/heldout.txt --seqlen 256 --nsamples 64 --limit 256 --save benchmarks/results

REAP's score is repeated with three draws of the calibration windows. The script also prunes half of the weights with
Wanda and SparseGPT, with all windows and with two. With two, experts with fewer than 32 tokens are pruned with the
statistics of all experts of their layer, or only those without any token.
"""

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from measuring import LanguageModel, Text, fingerprint, in_batches, perplexity, run_from_shell
from result import Runs

from wanda_lightning import prune, shrink
from wanda_lightning.calibration import observer
from wanda_lightning.experts.saliency import ExpertSaliency

DRAWS = (0, 1, 2)
GOALS = (0.5, 0.75, 0.25)


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


def by_mean(saliency, mixture):
    """Return the scores of REAP: the mean over the tokens that are routed to an expert."""
    norms, tokens = saliency._sums[mixture.name]
    return norms / tokens.clamp(min=1)


def main(options: Text, save: str = ""):
    """Measure all rows."""
    runs = Runs(save, "experts")
    for draw in DRAWS:
        language = LanguageModel(options, draw)
        case = {"weights": fingerprint(language.model), "draw": draw}
        planned = replace(language.planned, case=case)
        scores = {"REAP": by_mean, "REAP, sum": ExpertSaliency.of}
        if draw == 0:
            runs(planned, language.measure)
            weights(runs, planned, language)
            scores["uses"] = ExpertSaliency.tokens
            scores["norms"] = by_norm
            for seed in range(3):
                scores[f"random, seed {seed}"] = at_random(seed)
        for goal, (name, score) in product(GOALS, scores.items()):
            row = replace(planned, method=name, sparsity=goal, pattern="experts", arguments={})
            runs(row, partial(measure, row, language, patch.object(ExpertSaliency, "of", score)))


def measure(row, language, patched):
    """Prune a copy while something is patched, and return its perplexity."""
    model = copy.deepcopy(language.model)
    windows = language.data.calibration_windows[: row.calibration.windows]
    with patched:
        if row.pattern == "experts":
            shrink(model, in_batches(windows), experts=row.sparsity, progress=False)
        else:
            prune(model, in_batches(windows), row.sparsity, **row.arguments, progress=False)
    return {"perplexity": perplexity(model, language.evaluation)}


def weights(runs, planned, language):
    """Prune half of the weights, with all windows and with two."""
    # Experts with fewer tokens than this are pruned with the statistics of all experts of their layer.
    enough = observer.MIN_EXPERT_TOKENS
    cases = (
        ("", planned.calibration.windows, enough),
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
        runs(row, partial(measure, row, language, patched))


if __name__ == "__main__":
    run_from_shell(main)
