"""Measure what LoRA adapters in closed form regain of the perplexity that pruning costs, before any training.

    python benchmarks/repair.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results

Windows and pruning are those of quality.py; the adapters are fitted to the calibration windows.
"""

import argparse
import copy
from dataclasses import replace
from functools import partial

from measuring import columns
from quality import TEXT, LanguageModel, Measured, add_options, check_options, choices, perplexity
from result import Runs
from rich.console import Console

from wanda_lightning.lora import repair

METHODS = ("wanda", "sparsegpt", "best-permutation")  # a permuted model differs in its order from the dense one


def measure(language: LanguageModel, method: str, goal: str, rank: int) -> Measured:
    """Prune, and return the perplexity before and after the repair, and the share of parameters that it adds."""
    language.model.load_state_dict(language.dense)
    dense = copy.deepcopy(language.model)
    before = language.measure(choices(TEXT[method], goal))["perplexity"]
    forward = partial(_forward, language)
    adapted = repair(language.model, dense, language.calibration, rank, forward=forward, progress=False)
    trainable, parameters = adapted.get_nb_trainable_parameters()
    after = perplexity(adapted, language.evaluation)
    language.model = adapted.unload()
    return {"perplexity_before": before, "perplexity": after, "added": trainable / (parameters - trainable)}


def _forward(language: LanguageModel, batch: dict[str, object]) -> object:
    return language.model(**batch, use_cache=False)


def main() -> None:
    """Measure the missing rows and print the table."""
    parser = argparse.ArgumentParser(description="Measure adapters that repair a pruned model.")
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rank", type=int, default=32)
    parser.set_defaults(goals=("2:4",), held_out=False)
    options = parser.parse_args()
    check_options(parser, options, TEXT)
    runs, language = Runs(options.save, "repair"), LanguageModel(options)
    table = columns(f"{options.model}: perplexity, rank {options.rank}", "", "pruned", "repaired", "parameters added")
    for name in options.methods:
        for goal in options.goals:
            planned = replace(language.plan(name, goal, choices(TEXT[name], goal)), case={"rank": options.rank})
            found = runs(planned, partial(measure, language, name, goal, options.rank)).measured
            numbers = f"{found['perplexity_before']:.2f}", f"{found['perplexity']:.2f}", f"{found['added']:.1%}"
            table.add_row(f"{name}, {goal}", *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
