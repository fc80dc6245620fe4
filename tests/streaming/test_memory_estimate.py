"""The estimate of memory against files and against the memory of a real process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import forks
from support.pairwise import with_nightly
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from wanda_lightning import prune_from_disk
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.plan import config_for
from wanda_lightning.streaming import Samples, memory_to_measure, memory_to_prune

LENGTH, VOCABULARY, HIDDEN, INNER = 128, 4000, 512, 1408


def save(folder, layers, **choices):
    """Save a Llama in float32, in which a CPU computes fast."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, **choices)).save_pretrained(folder)
    return folder


def estimate(folder, samples, park="memory", **choices):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    config = config_for(PruningConfig.from_names(**choices), model)
    measuring = memory_to_measure(model, samples.length, samples.batch_size, park)
    return memory_to_prune(model, config, samples, park), measuring


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_as_they_are_stored(tmp_path, tied):
    memory, measuring = estimate(save(tmp_path / "model", 3, tie_word_embeddings=tied), Samples(4, LENGTH, 2))
    sizes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    block = sum(size for name, size in sizes.items() if ".layers.1." in name)
    assert memory.blocks == measuring.blocks == 2 * block
    assert memory.outside == measuring.outside == sum(sizes.values()) - 3 * block


def test_more_samples_need_more_memory_and_one_pass_less_statistics(tmp_path):
    folder = save(tmp_path / "model", 1)
    few, _ = estimate(folder, Samples(4, LENGTH, 2), method="sparsegpt")
    many, _ = estimate(folder, Samples(8, LENGTH, 2), method="sparsegpt")
    assert many.activations == 2 * few.activations == 8 * LENGTH * 2 * HIDDEN * 4
    assert many.work == few.work
    one_pass, _ = estimate(folder, Samples(4, LENGTH, 2), method="sparsegpt", sequential="layer")
    assert one_pass.work < few.work
    assert one_pass.activations > few.activations


def test_hidden_states_are_wider_than_factorized_embeddings(tmp_path):
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    memory, measuring = estimate(tmp_path / "model", Samples(4, LENGTH, 2))
    assert memory.activations == 4 * LENGTH * 2 * 64 * 4
    assert measuring.activations == 32 * 2 * LENGTH * 2 * 64 * 4


@pytest.mark.parametrize("choices", [{"recovery": "reconstruct"}, {"pattern": "2:4", "permutation": "assignment"}])
def test_other_choices_have_workspaces_of_their_own(tmp_path, choices):
    folder, samples = save(tmp_path / "model", 2), Samples(1, 8, 1)
    plain, _ = estimate(folder, samples, method="magnitude")
    memory, _ = estimate(folder, samples, method="magnitude", **choices)
    numbers = (
        (7 * 3 if "recovery" in choices else 5) * HIDDEN * INNER
    )  # a part of a block has three layers of this size
    assert plain.work < memory.work
    assert memory.work == pytest.approx(4 * numbers, rel=0.05)


def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(folder, output, batches, choices):
    """Print by how many bytes the peak of this process grows."""
    samples = [{"input_ids": torch.randint(VOCABULARY, (2, LENGTH))} for _ in range(batches)]
    start = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    prune_from_disk(folder, output, samples, 0.5, progress=False, **choices)
    print((kib("VmHWM") - start) * 1024)


def measured(folder, output, batches=2, **choices):
    found = forks.run(measure, folder, output, batches, choices)
    assert found.returncode == 0, found.stderr
    return int(found.stdout.split()[-1])


def test_one_batch_is_counted_if_the_others_are_on_disk(tmp_path):
    folder = save(tmp_path / "model", 2)
    for choices in ({}, {"sequential": "layer"}, {"method": "best"}):
        one, measuring_one = estimate(folder, Samples(2, LENGTH, 2), **choices)
        many, measuring = estimate(folder, Samples(64, LENGTH, 2), park="disk", **choices)
        assert many.activations == (one.activations if "method" not in choices else 2 * LENGTH * HIDDEN * 4 * 7)
        assert (many.work, many.blocks) == (one.work, one.blocks)
        assert measuring.activations == measuring_one.activations / 32 == 2 * LENGTH * 2 * HIDDEN * 4


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux reports"
)


@pytest.mark.nightly
@needs_linux
def test_activations_on_disk_are_not_in_memory(tmp_path):
    folder, choices = save(tmp_path / "model", 1), {"sequential": "layer", "batches": 24}
    on_disk = measured(folder, tmp_path / "disk", park="disk", **choices)
    in_memory = measured(folder, tmp_path / "memory", **choices)
    waiting = 23 * 2 * LENGTH * (2 * HIDDEN + INNER) * 4  # the residual stream, its norm and the output of the gate
    assert in_memory - on_disk > waiting


@needs_linux
@pytest.mark.parametrize("method", with_nightly(["wanda"], ["wanda", "sparsegpt"]))
def test_a_process_needs_about_as_much_however_many_blocks_there_are(tmp_path, method):
    memory, _ = estimate(save(tmp_path / "few", 2), Samples(4, LENGTH, 2), method=method)
    few = measured(tmp_path / "few", tmp_path / "first", method=method)
    many = measured(save(tmp_path / "many", 6), tmp_path / "second", method=method)
    assert many - few < memory.blocks  # four blocks more
    assert memory.total == pytest.approx(many, rel=0.5)  # the libraries themselves allocate some tens of MB
