"""Measure what pruning costs at the sizes of real models, as multiples of a plain forward pass.

    OMP_NUM_THREADS=1 python benchmarks/sizes.py FOLDER --save benchmarks/results

The models have the shapes of Llama 3.2 1B, Llama 2 7B and Qwen3 30B A3B, with random weights and two blocks, since time
is linear in the number of blocks. In memory, the vocabulary has 1,024 tokens, so embeddings and head hardly count. From
disk it is the model's own, and FOLDER needs 8 GB. Seconds are those of the processor, in one thread.

A run times one block, from the moment before its first layer is pruned to the same moment in the next block. Solving is
timed by itself. Two numbers of windows show how memory grows.
"""

import copy
import os
import re
import shutil
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from measuring import MIB, cost_of, in_new_process, random_model, random_windows, run_from_shell
from result import Result, Runs, Samples
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from wanda_lightning import Fisher, prune, prune_from_disk
from wanda_lightning.verbs import prune_weights

LENGTH = 2048
BATCH = 4  # as in the command
BLOCKS = 2
SHAPES = {
    "Llama 3.2 1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        num_attention_heads=32,
    ),
    "Llama 2 7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_key_value_heads=32,
        vocab_size=32000,
        num_attention_heads=32,
    ),
    "Qwen3 30B A3B": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        norm_topk_prob=True,
        num_attention_heads=32,
    ),
}
# The clock of the first block ends at the first layer of the second one, so no other layer there is solved.
FIRST_BLOCK = {"only": ("model.layers.0", "model.layers.1.self_attn.q_proj")}
BACKWARD = {"allocation": Fisher(num_samples=8, num_predictions=4096)}  # as in `best`
FLOAT32 = (("time", "wanda"),)
RUNS = (  # what a run measures, method, windows, further choices
    ("time", "wanda", 4, {}),
    ("time", "fast", 4, {}),
    ("time", "balanced", 4, FIRST_BLOCK),
    ("backward", "fast", 4, BACKWARD),
    ("disk", "wanda", 4, {}),
    ("memory", "wanda", 12, {}),
    ("memory", "fast", 12, {}),
    ("time", "best", 4, FIRST_BLOCK),
)


def two_blocks(name):
    """Return the configuration of a model with two blocks."""
    shape = copy.deepcopy(SHAPES[name])
    shape.num_hidden_layers = BLOCKS
    return shape


def in_memory(name, dtype, windows, choices, is_timed=True):
    """Prune in a process that has done nothing else; return seconds and memory."""
    torch.set_num_threads(1)
    config = two_blocks(name)
    config.vocab_size = 1024
    model = random_model(config, getattr(torch, dtype))
    batches = random_windows(config.vocab_size, windows, LENGTH, BATCH)
    step = partial(prune, model, batches, 0.5, **choices, progress=False)
    if not is_timed:
        return {"peak_mib": cost_of(step).peak_mib}

    # Before and after, since other programs may slow the processor down for a while.
    before = forward_seconds(model, batches[0]["input_ids"])
    with timed_layers() as times:
        started = time.process_time()
        cost = cost_of(step)
    after = forward_seconds(model, batches[0]["input_ids"])

    numbers = of_one_block(times, started, windows)
    numbers["forward_seconds"] = (before + after) / 2
    return numbers | {"peak_mib": cost.peak_mib, "weights_mib": full_size(name, dtype)}


@torch.no_grad()
def forward_seconds(model, windows):
    """Return the seconds of a plain forward pass of one window through one block."""
    model.model(windows[:1], use_cache=False)  # what the first run loads does not count
    started = time.process_time()
    model.model(windows, use_cache=False)
    return (time.process_time() - started) / len(windows) / BLOCKS


@contextmanager
def timed_layers():
    """Yield a list that gets the name of each stop, and when its layers begin and end to be pruned."""
    times = []
    prune_stop = prune_weights.prune_stop

    def timed(run, stop, observation):
        started = time.process_time()
        prune_stop(run, stop, observation)
        times.append((stop.name, started, time.process_time()))

    with patch.object(prune_weights, "prune_stop", timed):
        yield times


def of_one_block(times, started, windows):
    """Return the seconds of a block with and without solving, and those before the first layer is pruned."""
    stops = {0: [], 1: []}
    for name, begin, end in times:
        block = re.search(r"\.layers\.(\d)", name)[1]
        stops[int(block)].append((begin, end))

    begin = stops[0][0][0]
    solving = sum(end - begin for begin, end in stops[0])
    return {
        "before_seconds": begin - started,
        "block_seconds": (stops[1][0][0] - begin - solving) / windows,
        "solving_seconds": solving,
    }


def full_size(name, dtype):
    """Return the size of the weights of the whole model in MiB."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=getattr(torch, dtype))
    return model.get_memory_footprint(return_buffers=False) / MIB


def write_model(name, folder):
    """Write a random model with two blocks."""
    random_model(two_blocks(name), torch.bfloat16).save_pretrained(folder)


def from_disk(name, source, windows, choices):
    """Prune from disk in a process that has done nothing else; return memory, and bytes read and written."""
    torch.set_num_threads(1)
    output = source.with_name("pruned")
    shutil.rmtree(output, ignore_errors=True)
    batches = random_windows(SHAPES[name].vocab_size, windows, LENGTH, BATCH)

    def forward(model, batch):
        return model.base_model(**batch, use_cache=False)  # without logits, as the command

    for file in source.glob("*.safetensors"):
        forget(file)
    before = psutil.Process().io_counters()
    choices = {**choices, "forward": forward, "progress": False}
    cost = cost_of(partial(prune_from_disk, source, output, batches, 0.5, **choices))
    after = psutil.Process().io_counters()
    return {
        "peak_rss_mib": cost.start_mib + cost.peak_mib,
        "read_gb": (after.read_bytes - before.read_bytes) / 1e9,
        "written_gb": (after.write_chars - before.write_chars) / 1e9,
        "weights_mib": sum(file.stat().st_size for file in source.glob("*.safetensors")) / MIB,
    }


def forget(file):
    """Take a file out of the cache of the kernel, which would not count what is read from there."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(folder: Path, /, *, save: str = ""):
    """Measure each shape in bfloat16, and the seconds of the smallest one in float32, too."""
    runs = Runs(save, "sizes")
    for name, dtype in (*((name, "bfloat16") for name in SHAPES), (next(iter(SHAPES)), "float32")):
        for measures, method, windows, extra in RUNS:
            if dtype == "float32" and (measures, method) not in FLOAT32:
                continue
            planned = Result(
                model=name,
                method=method,
                sparsity=0.5,
                case={
                    "measures": measures,
                    "dtype": dtype,
                    "windows": windows,
                    "blocks": SHAPES[name].num_hidden_layers,
                },
                arguments={key: str(value) for key, value in extra.items()},
                calibration=Samples("random tokens", windows, LENGTH),
            )
            choices = {"method": method, **extra}
            arguments = (name, dtype, windows, choices, measures != "memory")
            measure = partial(in_new_process, in_memory, *arguments)
            if measures == "disk":
                source = folder / name.replace(" ", "-")
                if not (source.exists() or runs.saved(planned)):
                    in_new_process(write_model, name, source)
                measure = partial(in_new_process, from_disk, name, source, windows, choices)
            runs(planned, measure)


if __name__ == "__main__":
    run_from_shell(main)
