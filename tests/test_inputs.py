"""Wrong types and values at every public entry point: one sentence that names the option, before any work."""

import pytest
import torch
from support.disk import VOCABULARY, save_llama
from support.mlps import relu_mlp
from support.modules import tiny_llama
from support.quiet import prune
from support.refusals import refuses
from torch import nn
from transformers import LlamaForCausalLM

import wanda_lightning as wl
from wanda_lightning import CausalLMModule, prune_from_disk
from wanda_lightning.core import Structured
from wanda_lightning.streaming import perplexity_from_disk


def net():
    return relu_mlp(8, 8, 4)


# What is called, and what the sentence says.
CALLS = """
wl.prune(net(), keep_batch_norm="false") | keep_batch_norm must be one of True, False, but
wl.DistillFromDense(weight=0.0) | weight of DistillFromDense must be a number above 0 and at most 1
wl.DistillFromDense(temperature=0) | temperature of DistillFromDense must be a number above 0
wl.TextDataModule(calibration=None) | calibration must be the name of a text
wl.TextDataModule(seed=None) | seed must be a whole number of at least 0 .* but it is None
wl.ImageDataModule("digits", num_samples="64") | num_samples must be a whole number of .* is '64'
wl.ImageDataModule("digits", num_workers=-1) | num_workers must be a whole number of at least 0
wl.ImageDataModule("cifar") | data must be digits, or an existing folder
wl.ImageClassifierModule("test_vit", pretrained="no") | pretrained must be one of True, False
wl.CausalLMModule("folder", trust_remote_code="false") | trust_remote_code must be one of True, False
wl.CausalLMModule(tiny_llama(), lr_decay="false") | lr_decay must be one of True, False
wl.shrink(net(), units=50) | units must be a number above 0 and below 1, but it is 50
wl.shrink(net(), units=0.5, refit="no") | refit must be one of True, False
wl.shrink(net(), units=0.5, multiple_of=1.5) | ^multiple_of must be a whole number of at least 1
wl.shrink(net(), units=0.5, multiple_of=1) | since units=0.5 reads calibration data, but none were given
wl.shrink(net(), skip="0") | skip='0' would be ignored without units. Give units=0.5, for example, or leave skip out
wl.prune(net(), pattern=Structured()) | pattern=Structured.* Use shrink.model, batches, units=0.5
wl.Distill(seed=2**32) | seed of Distill must be a whole number of at least 0 and at most 4294967295
"""


@pytest.mark.parametrize("line", CALLS.strip().splitlines())
def test_a_wrong_type_is_named(line):
    call, message = line.split(" | ")
    with refuses(message):
        eval(call, {"wl": wl, "net": net, "tiny_llama": tiny_llama, "Structured": Structured})


def test_batches_of_another_dtype_prune_nothing():
    model = net()
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="dtype"):
        prune(model, [torch.ones(2, 8, dtype=torch.float16)])
    assert torch.equal(model[0].weight, before)


def test_batches_of_another_dtype_in_a_forward_with_autocast():
    def forward(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    model = net()
    prune(model, [torch.randn(9, 8).bfloat16()], forward=forward)
    assert (model[0].weight == 0).sum() == model[0].weight.numel() // 2


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_elements_are_skipped():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 0)])
    report = prune(model, method="magnitude")
    assert [skipped.detail for skipped in report.skipped] == ["has no elements"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("token", [VOCABULARY, -1])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, batch, _: prune(model, [batch]),
        lambda model, batch, _: CausalLMModule(model).training_step(batch, 0),
        lambda model, batch, _: CausalLMModule(model).validation_step([batch["input_ids"]], 0),
        lambda model, batch, _: perplexity_from_disk(model.name_or_path, [batch], progress=False),
        lambda model, batch, output: prune_from_disk(
            model.name_or_path, output, [batch], progress=False
        ),
    ],
)
def test_tokens_without_an_embedding(llama, tmp_path, call, token):
    with refuses(f"input_ids must be from 0 to {VOCABULARY - 1}, .* but one is {token}"):
        call(llama, {"input_ids": torch.full((2, 8), token)}, tmp_path / "out")
