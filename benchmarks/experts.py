r"""Take experts out of a mixture by REAP's score, by how often they are used, by their norms, and at random.

    python recipes/llm/small_mixture.py --output out/small_mixture
    python benchmarks/experts.py --model out/small_mixture --calibration out/small_mixture_text/training.txt \
        --eval out/small_mixture_text/heldout.txt --seqlen 256 --nsamples 64 --limit 256 \
        --save benchmarks/results

It also prunes half of the weights with Wanda and SparseGPT, with all windows and with two. With two, experts with fewer
than 32 tokens are pruned with the statistics of all experts of their layer, or only those without any token.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from measuring import LanguageModel, Text, fingerprint, run_from_shell
from result import Runs
from torch import Tensor

from wanda_lightning import prune
from wanda_lightning.calibration import observer
from wanda_lightning.experts.mixtures import Mixture
from wanda_lightning.experts.saliency import ExpertSaliency

Score = Callable[[ExpertSaliency, Mixture], Tensor]


def by_norm(_: ExpertSaliency, mixture: Mixture) -> Tensor:
    """Return the squared norm of all weights of each expert."""
    norms = torch.zeros(mixture.number, dtype=torch.float64)
    for weight in mixture.experts.parameters():
        norms += weight.double().square().flatten(1).sum(1)
    return norms


def at_random(seed: int) -> Score:
    """Return a random score."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, mixture: torch.rand(mixture.number, generator=generator, dtype=torch.float64)


def main(options: Text, goals: tuple[float, ...] = (0.25, 0.5), save: str = "") -> None:
    """Measure all rows."""
    language = LanguageModel(options)
    runs = Runs(save, "experts")
    dense = language.model
    planned = replace(language.planned, case={"weights": fingerprint(dense)})
    runs(planned, language.measure)

    def drop_experts(name: str, goal: float, score: Score) -> None:
        """Measure the model without experts, those with the lowest scores."""

        def measure() -> dict[str, float]:
            language.model = copy.deepcopy(dense)
            with patch.object(ExpertSaliency, "__call__", score):
                prune(language.model, language.calibration, goal, pattern="experts", progress=False)
            return language.measure()

        runs(replace(planned, method=name, sparsity=goal, pattern="experts"), measure)

    def prune_half(name: str, method: str, windows: int, min_tokens: int) -> None:
        """Measure the model with half of its weights; experts with fewer tokens share their statistics."""
        calibration = language.calibration
        if windows < options.nsamples:
            calibration = [{key: ids[:windows] for key, ids in calibration[0].items()}]

        def measure() -> dict[str, float]:
            language.model = copy.deepcopy(dense)
            with patch.object(observer, "MIN_EXPERT_TOKENS", min_tokens):
                prune(language.model, calibration, 0.5, method=method, progress=False)
            return language.measure()

        row = replace(
            planned,
            method=name,
            sparsity=0.5,
            arguments={"method": method},
            calibration=replace(planned.calibration, windows=windows),
        )
        runs(row, measure)

    for goal in goals:
        drop_experts("REAP", goal, ExpertSaliency.__call__)
        drop_experts("uses", goal, ExpertSaliency.tokens)
        drop_experts("norms", goal, by_norm)
        for seed in range(3):
            drop_experts(f"random, seed {seed}", goal, at_random(seed))

    enough = observer.MIN_EXPERT_TOKENS
    for method in ("wanda", "sparsegpt"):
        prune_half(method, method, options.nsamples, enough)
        prune_half(f"{method}, 2 windows", method, 2, enough)
        prune_half(f"{method}, 2 windows, each expert alone", method, 2, 1)


if __name__ == "__main__":
    run_from_shell(main)
