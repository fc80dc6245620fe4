"""Measure what LoRA adapters in closed form regain of the perplexity that pruning costs, before and after training.

    python benchmarks/repair.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results

Windows and pruning are those of quality.py; the adapters are fitted to the calibration windows. With `--steps`, they
are then trained, each step on another window of the calibration text, and so are adapters that start at zero.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from measuring import columns
from peft import LoraConfig, PeftModel, get_peft_model
from quality import TEXT, LanguageModel, Measured, add_options, check_options, choices, perplexity
from result import Runs
from rich.console import Console
from torch import Tensor

from wanda_lightning import TextDataModule
from wanda_lightning.lora import repair

METHODS = ("wanda", "sparsegpt", "best-permutation")  # a permuted model differs in its order from the dense one
LEARNING_RATE = 5e-4  # of LoRA in docs/measured.md


def measure(language: LanguageModel, method: str, goal: str, rank: int, windows: Sequence[Tensor]) -> Measured:
    """Prune, and return the perplexity before and after the repair, and the share of parameters that it adds.

    If there are windows to train on, also return the perplexity after training from there, and from zero.
    """
    language.model.load_state_dict(language.dense)
    dense = copy.deepcopy(language.model)
    before = language.measure(choices(TEXT[method], goal))["perplexity"]
    forward = partial(_forward, language)
    adapted = repair(language.model, dense, language.calibration, rank, forward=forward, progress=False)
    trainable, parameters = adapted.get_nb_trainable_parameters()
    measured = {"perplexity_before": before, "perplexity": perplexity(adapted, language.evaluation)}
    measured["added"] = trainable / (parameters - trainable)
    if windows:
        measured["perplexity_trained"] = train(adapted, windows, language)
        targets = sorted(adapted.peft_config["default"].target_modules)
        language.model = adapted.unload()
        torch.manual_seed(0)  # of the weights of the fresh adapters
        fresh = get_peft_model(language.model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        measured["perplexity_trained_plain"] = train(fresh, windows, language)
        adapted = fresh
    language.model = adapted.unload()
    return measured


def train(adapted: PeftModel, windows: Sequence[Tensor], language: LanguageModel) -> float:
    """Train the adapters, a step for each window, and return the perplexity."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(windows))
    for window in windows:
        with torch.autocast("cpu", torch.bfloat16):
            adapted(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return perplexity(adapted, language.evaluation)


def _forward(language: LanguageModel, batch: dict[str, object]) -> object:
    return language.model(**batch, use_cache=False)


def main() -> None:
    """Measure the missing rows and print the table."""
    parser = argparse.ArgumentParser(description="Measure adapters that repair a pruned model.")
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=0, help="of training from the adapters, and from zero")
    parser.set_defaults(goals=("2:4",), held_out=False, draw=None)
    options = parser.parse_args()
    check_options(parser, options, TEXT)
    runs, language = Runs(options.save, "repair"), LanguageModel(options)
    windows: Sequence[Tensor] = ()
    if options.steps:
        data = {"seqlen": options.seqlen, "num_samples": options.steps, "seed": 1}
        windows = [*TextDataModule(language.tokenizer, options.calibration, options.eval, **data).calibration_windows]
    shown = ["perplexity_before", "perplexity", "added"]
    shown += ["perplexity_trained", "perplexity_trained_plain"] if windows else []
    table = columns(f"{options.model}: rank {options.rank}", "", *shown)
    for name in options.methods:
        for goal in options.goals:
            case = {"rank": options.rank} | ({"steps": options.steps} if options.steps else {})
            planned = replace(language.plan(name, goal, choices(TEXT[name], goal)), case=case)
            found = runs(planned, partial(measure, language, name, goal, options.rank, windows)).measured
            table.add_row(f"{name}, {goal}", *(f"{found[quantity]:.4g}" for quantity in shown))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
