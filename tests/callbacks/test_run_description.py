"""What a report says about the run in which a callback has pruned: never more than the Trainer knows."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.callbacks import Net, loader, same, trainer
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
from wanda_lightning.report import REPORT_NAME, Measured, Run


@pytest.fixture
def text(tmp_path):
    words = torch.randint(128, (400,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    file = f"{tmp_path}/text.txt"
    return TextDataModule(tiny_tokenizer(), file, file, seqlen=16, num_samples=8, batch_size=2, limit=5, seed=3)


def module():
    return CausalLMModule(tiny_llama(), tiny_tokenizer())


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_a_loop_that_prunes_and_measures(tmp_path, text, loop):
    callback = WandaPrune(num_samples=4, report_dir=tmp_path / "out")
    run = trainer(callback)
    (measured,) = getattr(run, loop)(model := module(), text, verbose=False)
    expected = Run(
        model="",
        metric="perplexity",
        after=measured[f"{loop[:3] if loop == 'validate' else loop}_perplexity"],
        data=f"{text.evaluation}, 5 windows of 16 tokens",
        calibration=f"{text.calibration}, 4 windows of 16 tokens, seed 3",
    )
    assert callback.report.run == expected
    assert PruningReport.from_json((tmp_path / "out" / REPORT_NAME).read_text()).run == expected
    getattr(run, loop)(model, text, verbose=False)  # the model is not pruned again
    assert callback.report.run == expected


def test_results_on_several_texts(tmp_path, text):
    (tmp_path / "other.txt").write_text(" ".join(f"w{7 * i % 128}" for i in range(100)))
    files = text.evaluation, f"{tmp_path}/other.txt"
    both = TextDataModule(tiny_tokenizer(), files[0], files, seqlen=16, num_samples=8, batch_size=2, limit=5, seed=3)
    callback = WandaPrune(num_samples=4)
    run = trainer(callback)
    shown = run.validate(module(), both, verbose=False)
    assert [list(each) for each in shown] == [
        ["val_perplexity", f"val_perplexity/{files[0]}"],
        [f"val_perplexity/{files[1]}"],
    ]
    measured = float(run.callback_metrics[f"val_perplexity/{files[1]}"])
    assert callback.report.run.others == (Measured(f"{files[1]}, 5 windows of 16 tokens", None, measured),)


def test_loops_after_another_that_has_pruned(text):
    callback, model = PruningCallback(method="magnitude"), module()
    trainer(callback).predict(model, text)
    trainer(callback).validate(model, text, verbose=False)
    trainer(callback, max_steps=1, num_sanity_val_steps=1, limit_val_batches=1).fit(model, text)
    assert callback.report.run == Run()


def test_an_accuracy_in_percent_is_not_taken_for_a_fraction():
    class Percent(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", 87.5)

    callback = PruningCallback(method="magnitude")
    trainer(callback).validate(Percent(), loader(), verbose=False)
    assert callback.report.run == Run()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": "test_vit", "pretrained": False}, "timm:test_vit (not pretrained)"),
        ({"model": "timm:test_vit", "checkpoint": "w.safetensors"}, "timm:test_vit (w.safetensors)"),
    ],
)
def test_the_name_of_a_classifier_says_which_weights_it_had(tmp_path, monkeypatch, options, name):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_vit").state_dict(), "w.safetensors")
    callback, images = PruningCallback(method="magnitude"), DataLoader(torch.zeros(1, 3, 160, 160))
    trainer(callback).predict(ImageClassifierModule(**options), images)
    assert callback.report.run == Run(model=name)


def test_the_name_of_a_language_model_is_that_of_its_folder(tmp_path, text):
    tiny_llama().save_pretrained(tmp_path / "llama")
    for model in (f"{tmp_path}/llama", AutoModelForCausalLM.from_pretrained(tmp_path / "llama")):
        callback = PruningCallback(method="magnitude")
        trainer(callback).predict(CausalLMModule(model, tiny_tokenizer()), text)
        assert callback.report.run == Run(model=f"{tmp_path}/llama")


def test_calibration_data_of_ones_own_and_a_part_of_the_text_are_not_described(text):
    callback = WandaPrune(num_samples=4, dataloader=[{"input_ids": torch.zeros(4, 8, dtype=torch.long)}])
    trainer(callback, limit_val_batches=1).validate(module(), text, verbose=False)
    run = callback.report.run
    assert (run.calibration, run.data, run.metric) == ("", "", "perplexity")
    assert run.after is not None


def test_a_page_is_written_when_the_callback_prunes(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra report")
    callback = PruningCallback(0.5, report=tmp_path / "out/report.html", num_samples=12, method="sparsegpt")
    trainer(callback, max_steps=1).fit(Net(), loader(), loader())
    page = Page(tmp_path / "out/report.html")
    assert page.open == []
    assert all(layer.name in page.text for layer in callback.report.layers)


@pytest.mark.parametrize(("option", "place"), [("report", "file/report.html"), ("report_dir", "file")])
def test_what_cannot_be_written_is_refused(tmp_path, option, place):
    (tmp_path / "file").write_text("mine")
    module = Net()
    with pytest.raises(OSError, match="file"):
        trainer(WandaPrune(num_samples=12, at_step=2, **{option: tmp_path / place}), max_steps=3).fit(module, loader())
    assert same(module, Net())
    assert (tmp_path / "file").read_text() == "mine"
