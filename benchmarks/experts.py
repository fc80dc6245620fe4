r"""Take experts out of a mixture by REAP's score, by how often they are used, by their norms, and at random.

    python recipes/llm/small_mixture.py --output out/small_mixture
    python benchmarks/experts.py --model out/small_mixture --calibration out/small_mixture_text/training.txt \
        --eval out/small_mixture_text/heldout.txt --seqlen 256 --nsamples 64 --save benchmarks/results

It also prunes half of the mixture's weights with Wanda and SparseGPT, on all windows and on two, where experts with
fewer than 32 tokens use the statistics of all experts of their layer, and without that.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
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
    return sum((weight.double().square().flatten(1).sum(1) for weight in mixture.experts.parameters()), torch.zeros(()))


def at_random(seed: int) -> Score:
    """Return a random score."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, mixture: torch.rand(mixture.number, generator=generator, dtype=torch.float64)


def main(options: Text, goals: tuple[float, ...] = (0.25, 0.5), save: str = "") -> None:
    """Measure all rows."""
    language, runs = LanguageModel(options), Runs(save, "experts")
    dense, planned = language.model, replace(language.planned, case={"weights": fingerprint(language.model)})
    runs(planned, language.measure)

    def row(name: str, goal: float, score: Score = ExpertSaliency.__call__) -> None:
        def measure() -> dict[str, float]:
            language.model = copy.deepcopy(dense)
            with patch.object(ExpertSaliency, "__call__", score):
                prune(language.model, language.calibration, goal, pattern="experts", progress=False)
            return language.measure()

        runs(replace(planned, method=name, sparsity=goal, pattern="experts"), measure)

    def half(name: str, calibration: Sequence[Any], enough: int) -> None:
        def measure() -> dict[str, float]:
            language.model = copy.deepcopy(dense)
            with patch.object(observer, "MIN_EXPERT_TOKENS", enough):
                prune(language.model, calibration, 0.5, method=name.partition(",")[0], progress=False)
            return language.measure()

        runs(replace(planned, method=name, sparsity=0.5), measure)

    for goal in goals:
        row("REAP", goal)
        row("uses", goal, ExpertSaliency.tokens)
        row("norms", goal, by_norm)
        for seed in range(3):
            row(f"random, seed {seed}", goal, at_random(seed))
    two = [{name: each[:2] for name, each in language.calibration[0].items()}]
    for method in ("wanda", "sparsegpt"):
        half(method, language.calibration, observer.MIN_EXPERT_TOKENS)
        half(f"{method}, 2 windows", two, observer.MIN_EXPERT_TOKENS)
        half(f"{method}, 2 windows, each expert alone", two, 1)


if __name__ == "__main__":
    run_from_shell(main)
