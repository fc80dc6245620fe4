"""Run commands in this process, and measure what they wrote."""

import math

import torch
import transformers

from wanda_lightning.cli import main

SEQLEN = 32


OUT = ["--save", "out", "--save_model", "out/model"]


def run(*arguments):
    """The exit status of `wanda-lightning ARGUMENTS`."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def zeros_by_layer(model, globs=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
    return {name: m.weight == 0 for name, m in model.named_modules() if name.endswith(globs)}


def perplexity_by_hand(model, text, windows):
    """The reference's formula on bytes, with the loss of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    ids = torch.tensor(tokenizer(text).input_ids[: windows * SEQLEN]).view(windows, SEQLEN)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    return math.exp(sum(losses) / len(losses))


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
