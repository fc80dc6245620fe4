"""A tiny language model in files, and ways to prune or shrink it from there."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.layers import rng
from support.modules import tiny_llama
from support.quiet import prune, shrink, shrinks
from support.refusals import alike
from support.reports import read_json
from transformers import AutoModelForCausalLM

from wanda_lightning import OWL, PerLayer, Reconstruct, prune_from_disk, shrink_from_disk
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.output_folder import OutputFolder

VOCABULARY = 64

CHOICES = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "layer": {"method": "wanda", "sequential": "layer"},
    "2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "reconstruct": {"method": "wanda", "recovery": Reconstruct()},
    "skip": {"method": "wanda", "skip": ["model.layers.1"]},
    "head": {"method": "wanda", "only": ["*.mlp"]},
    "owl": {"method": "wanda", "allocation": "owl"},
    "owl_sparsegpt": {"method": "sparsegpt", "allocation": "owl", "sequential": "layer"},
    "owl without statistics": {"method": "magnitude", "allocation": OWL(m=2.0)},
    "none": {"method": "wanda", "sequential": "none", "allocation": "owl"},
    "none without statistics": {"method": "magnitude", "sequential": "none"},
    "best 2:4": {"method": "best", "pattern": "2:4"},
    "units": {"units": 0.5},
    "units_reconstruct": {"units": 0.5, "recovery": Reconstruct()},
    "per_layer": {"method": "wanda", "allocation": PerLayer({"*.mlp.*": 0.6})},
    "experts": {"experts": 0.5},
    "experts_block": {"experts": 0.5, "sequential": "block"},
}


def batches(seed=0):
    generator = rng(seed)
    return [
        {"input_ids": torch.randint(VOCABULARY, (2, 48), generator=generator)} for _ in range(3)
    ]


def save_llama(folder):
    """Save a tied Llama in bfloat16, in several files."""
    model = tiny_llama(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def add_predictions(folder):
    """Add the weights of multi-token prediction to a folder, which transformers does not load; return them."""
    shape = (5, 3)
    tensors = {
        "mtp.fc.weight": torch.randn(shape),
        "mtp.layers.0.mlp.gate.weight": torch.randn(shape).half(),
    }
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    for (name, tensor), file in zip(tensors.items(), (files[0], files[-1]), strict=True):
        save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})
        if index.exists():
            listed = read_json(index)
            listed["weight_map"][name] = file.name
            index.write_text(json.dumps(listed))
    return tensors


def weights(folder):
    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_memory(source, folder, samples, auto_class=AutoModelForCausalLM, **choices):
    """Prune or shrink a model in memory and save it; return the report."""
    model = auto_class.from_pretrained(source)
    report = (shrink if shrinks(choices) else prune)(model, samples, **choices)
    model.save_pretrained(folder)
    return report


def stream(*arguments, **choices):
    """Prune or shrink a model from disk; return the report."""
    change = shrink_from_disk if shrinks(choices) else prune_from_disk
    return change(*arguments, progress=False, **choices)


def prune_until_killed(source, folder, after, choices):
    """Prune or shrink a model in a process of its own, which is killed when so many parts are written."""
    save = OutputFolder.save

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_or_kill(self, part, *args):
        kill() if len(self.written) == after else save(self, part, *args)

    OutputFolder.save = save_or_kill
    OutputFolder.forget = kill
    stream(source, folder, batches(), **choices)


def same(first, second):
    """Whether two sets of tensors are equal, bit for bit."""
    return first.keys() == second.keys() and all(alike(first[name], second[name]) for name in first)


def count_blocks(monkeypatch):
    """The parts of a checkpoint that are in memory, and how many blocks were there after each was loaded."""
    here = set()
    counts = []
    load = Checkpoint.load
    unload = Checkpoint.unload

    def counting(self, part, *args):
        result = load(self, part, *args)
        here.add(part)
        counts.append(len(here - {""}))
        return result

    def discounting(self, part):
        unload(self, part)
        here.discard(part)

    monkeypatch.setattr(Checkpoint, "load", counting)
    monkeypatch.setattr(Checkpoint, "unload", discounting)
    return here, counts


def interrupted(source, folder, monkeypatch, at=None, **choices):
    """Leave a folder with all parts before `at`, as a killed run does; by default with all parts."""
    save = OutputFolder.save

    def stop(*_):
        raise KeyboardInterrupt

    def save_others(self, part, *arguments):
        if part == at:
            stop()
        save(self, part, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "save", save_others)
        patched.setattr(OutputFolder, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            stream(source, folder, batches(), **choices)
