"""What a report says about the run in which a callback has pruned: never more than the Trainer knows."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.callbacks import Net, fit_module, loader, same, trainer, validate_module
from support.layers import rng
from support.modules import tiny_llama, tiny_tokenizer
from support.reports import Page
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from wanda_lightning import (
    CausalLMModule,
    ImageClassifierModule,
    PruningCallback,
    PruningReport,
    TextDataModule,
    WandaPrune,
)
from wanda_lightning.report import Circumstances


@pytest.fixture
def text(tmp_path):
    words = torch.randint(128, (400,), generator=rng())
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    file = f"{tmp_path}/text.txt"
    return TextDataModule(
        tiny_tokenizer(), file, file, seqlen=16, num_samples=8, batch_size=2, limit=5, seed=3
    )


def module():
    return CausalLMModule(tiny_llama(), tiny_tokenizer())


def test_the_report_names_the_samples_of_the_datamodule(tmp_path, text):
    callback = WandaPrune(num_samples=4, report_dir=tmp_path)
    validate_module(module(), callback, data=text)
    expected = f"{text.calibration}, 4 windows of 16 tokens, seed 3"
    assert callback.report.run == Circumstances(calibration=expected)
    assert PruningReport.load(tmp_path).run == callback.report.run


@pytest.mark.parametrize(
    "callback",
    [
        WandaPrune(num_samples=4, dataloader=[{"input_ids": torch.zeros(4, 8, dtype=torch.long)}]),
        PruningCallback(method="magnitude"),
    ],
)
def test_the_report_names_no_data_that_were_not_read(text, callback):
    validate_module(module(), callback, data=text)
    assert callback.report.run == Circumstances()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CausalLMModule("llama", tiny_tokenizer()), "llama"),
        (
            lambda: CausalLMModule(AutoModelForCausalLM.from_pretrained("llama"), tiny_tokenizer()),
            "llama",
        ),
        (
            lambda: ImageClassifierModule("test_vit", pretrained=False),
            "timm:test_vit (not pretrained)",
        ),
        (
            lambda: ImageClassifierModule("timm:test_vit", checkpoint="w.safetensors"),
            "timm:test_vit (w.safetensors)",
        ),
    ],
)
def test_the_name_says_which_weights_the_model_had(tmp_path, monkeypatch, make, name):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_vit").state_dict(), "w.safetensors")
    tiny_llama().save_pretrained("llama")
    module = make()
    callback = PruningCallback(method="magnitude")
    inputs = torch.zeros(1, 8).long()
    if isinstance(module, ImageClassifierModule):
        inputs = torch.zeros(1, 3, 160, 160)
    trainer(callback).predict(module, DataLoader(inputs))
    assert callback.report.run == Circumstances(model=name)


def test_a_page_is_written_of_what_the_callback_prunes(tmp_path):
    callback = PruningCallback(0.5, num_samples=12, method="sparsegpt")
    trainer(callback, max_steps=1).fit(Net(), loader(), loader())
    page = Page(callback.report.save(tmp_path / "out/report.html"))
    assert page.open == []
    assert all(layer.name in page.text for layer in callback.report.layers)


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    module = Net()
    callback = WandaPrune(num_samples=12, at_step=2, report_dir=tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        fit_module(module, callback, max_steps=3)
    assert same(module, Net())
    assert (tmp_path / "file").read_text() == "mine"
