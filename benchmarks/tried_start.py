"""A start for adapters that keep zeros: the factors whose kept part comes nearest to a least-squares refit.

    python benchmarks/tried_start.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --steps 200

With the statistics of the dense model, D is what a least-squares refit adds to the weights that Wanda keeps. For each
layer, B and A minimize `||(D - (B A) * mask) X^T||^2`, first by the singular vectors of `D (X^T X)^(1/2)`, then by
Adam. The perplexity is that of Wanda, of Wanda with these adapters, and of the refit; then that of each after training
adapters, where Wanda and the refit start with a product of zero.
"""

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from quality import LanguageModel, add_options, perplexity
from repair import train
from torch import Tensor

from wanda_lightning import Refit, TextDataModule, prune
from wanda_lightning.core.gram import dampened
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.refit import refit
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.lora import KeepZerosLoraConfig

GRAMS: list[Tensor] = []  # of the layers in the order in which they are pruned


@dataclass(frozen=True)
class StoringRefit(Refit):
    """Store the Gram matrix of each layer."""

    def __call__(self, weight: Tensor, inputs: InputStatistics, selection: Selection) -> tuple[Tensor, Tensor]:
        """Refit."""
        GRAMS.append(inputs.sums["gram"] / inputs.count)
        return super().__call__(weight, inputs, selection)


def start(change: Tensor, keep: Tensor, gram: Tensor, rank: int, steps: int = 50) -> tuple[Tensor, Tensor, float]:
    """Return B and A, and the share of the squared error that they remove."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = values.clamp(min=float(values.max()) * 1e-6).sqrt()
    left, middle, right = torch.linalg.svd(change.double() @ (vectors * root), full_matrices=False)
    b = (left[:, :rank] * middle[:rank].sqrt()).float()
    a = (middle[:rank, None].sqrt() * (right[:rank] / root) @ vectors.t()).float()

    def error() -> Tensor:
        lost = change - (b @ a) * keep
        return ((lost @ gram) * lost).sum()

    whole = float(((change @ gram) * change).sum())
    best = (float(error()), b.clone(), a.clone())
    b.requires_grad_(), a.requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [x], "lr": 0.02 * float(x.detach().square().mean().sqrt())} for x in (b, a)]
    )
    for _ in range(steps):
        loss = error()
        if float(loss.detach()) < best[0]:
            best = (float(loss.detach()), b.detach().clone(), a.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best[1], best[2], 1 - best[0] / whole


def main() -> None:
    """Compare the starts."""
    parser = argparse.ArgumentParser(description="Compare starts of adapters that keep zeros.")
    add_options(parser)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=0)
    parser.set_defaults(held_out=False, draw=None)
    options = parser.parse_args()
    language = LanguageModel(options)
    data = {"seqlen": options.seqlen, "num_samples": max(1, options.steps), "seed": 1}
    windows = [*TextDataModule(language.tokenizer, options.calibration, options.eval, **data).calibration_windows]
    chosen: dict[str, Any] = {"sparsity": 0.5, "pattern": "2:4", "sequential": "none", "progress": False}

    def pruned(**method: Any) -> dict[str, Tensor]:
        language.model.load_state_dict(language.dense)
        report = prune(
            language.model,
            language.calibration,
            forward=lambda b: language.model(**b, use_cache=False),
            **chosen,
            **method,
        )
        names[:] = [layer.name for layer in report.layers]
        return copy.deepcopy(language.model.state_dict())

    def trained(state: dict[str, Tensor], factors: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
        language.model.load_state_dict(state)
        torch.manual_seed(0)
        config = KeepZerosLoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=list(names))
        adapted = get_peft_model(language.model, config)
        for layer, (b, a) in factors.items():
            module = adapted.base_model.model.get_submodule(layer)
            module.lora_B["default"].weight.data.copy_(b)
            module.lora_A["default"].weight.data.copy_(a)
        print(f"{name}: {perplexity(adapted, language.evaluation):.2f}", flush=True)
        if options.steps:
            print(
                f"  after {options.steps} steps: {train(adapted, windows[: options.steps], language):.2f}", flush=True
            )
        language.model = adapted.unload()

    names: list[str] = []
    pruned(solver=StoringRefit())
    wanda = pruned(method="wanda")
    refitted, factors, shares = dict(wanda), {}, []
    for layer, gram in zip(names, GRAMS, strict=True):
        dense, before = language.dense[f"{layer}.weight"], wanda[f"{layer}.weight"]
        keep = before != 0
        refitted[f"{layer}.weight"], _ = refit(dense, before, keep, dampened(gram, Refit().dampening), Refit().steps)
        left, right, share = start(refitted[f"{layer}.weight"] - before, keep.float(), gram, options.rank)
        factors[layer] = left, right
        shares.append(share)
    print(
        f"removed of what a refit removes: {min(shares):.0%} to {max(shares):.0%}, mean {sum(shares) / len(shares):.0%}"
    )
    trained(wanda, {}, "Wanda")
    trained(wanda, factors, f"Wanda and factors of rank {options.rank}")
    trained(refitted, {}, "Wanda and a refit")


if __name__ == "__main__":
    main()
