"""The language model module against slow loops and plain Hugging Face."""

import re
from itertools import chain
from statistics import fmean

import pytest
import torch
from jsonargparse import ArgumentParser
from support.callbacks import WITHOUT_ADVICE, same, trainer
from support.data import byte_tokenizer
from support.modules import (
    MASKS,
    slow_losses,
    slow_perplexity,
    tiny_llama,
    tiny_tokenizer,
    windows_of_text,
)
from support.refusals import refuses
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from wanda_lightning import TextDataModule
from wanda_lightning.lightning_modules import CausalLMModule

pytestmark = WITHOUT_ADVICE


@pytest.mark.parametrize("mask", MASKS)
def test_all_loops_equal_the_slow_loop(mask):
    model = tiny_llama()
    batch = {"input_ids": windows_of_text()}
    attention_mask = MASKS[mask](batch["input_ids"])
    if attention_mask is not None:
        batch["attention_mask"] = attention_mask
    samples = [{name: rows[w] for name, rows in batch.items()} for w in range(7)]
    loader = DataLoader(samples, batch_size=1 if mask == "right padding" else 3)
    with torch.no_grad():
        logits = model(**batch).logits
    expected = pytest.approx(slow_perplexity(logits, **batch), rel=1e-5)

    module = CausalLMModule(model)
    assert trainer().validate(module, loader, verbose=False) == [{"val_perplexity": expected}]
    assert trainer().test(module, loader, verbose=False) == [{"test_perplexity": expected}]
    assert model.training
    losses = torch.cat(trainer().predict(module, loader))
    assert losses[~losses.isnan()].mean().exp().item() == expected
    module.val_perplexity.update(logits, **batch)  # after loops, which run in inference mode
    assert module.val_perplexity.compute().item() == expected


def loaders_of_two_texts():
    return [DataLoader(part, batch_size=2) for part in windows_of_text().split(4)]


@pytest.mark.parametrize(("loop", "name"), [("validate", "val_"), ("test", "test_")])
def test_several_dataloaders_have_a_perplexity_each(loop, name):
    module = CausalLMModule(tiny_llama())
    alone = []
    for loader in loaders_of_two_texts():
        (measured,) = getattr(trainer(), loop)(module, loader, verbose=False)
        alone.append(measured[f"{name}perplexity"])

    run = trainer()
    first, second = getattr(run, loop)(module, loaders_of_two_texts(), verbose=False)
    assert first == {f"{name}perplexity": alone[0]}
    assert second == {f"{name}ppl/1": alone[1]}
    assert run.callback_metrics == {**first, **second}
    losses = trainer().predict(module, loaders_of_two_texts())
    assert [torch.cat(part).mean().exp().item() for part in losses] == pytest.approx(alone)


def test_the_printed_table_shows_each_text_once_with_its_whole_name(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    texts = ("sklearn-docs", "python-docs")
    data = TextDataModule(byte_tokenizer(), evaluation=texts, seqlen=20, limit=2)
    trainer().validate(CausalLMModule(tiny_llama(vocab_size=300)), data)
    names = re.findall(r"val_\S+", capsys.readouterr().out)
    assert names == ["val_perplexity", "val_ppl/python-docs"]


def test_an_interrupted_loop_does_not_change_the_next_one():
    module = CausalLMModule(tiny_llama())
    ids = windows_of_text()
    whole = DataLoader(ids[3:])
    (expected,) = trainer().validate(module, whole, verbose=False)
    bad = DataLoader([*ids[:3], torch.full_like(ids[0], 128)])
    for interrupted in (bad, [DataLoader(ids[:3]), bad]):
        with refuses("input_ids must be"):
            trainer().validate(module, interrupted, verbose=False)
        run = trainer()
        run.validate(module, [whole, whole], verbose=False)
        assert {float(value) for value in run.callback_metrics.values()} == set(expected.values())


@pytest.mark.parametrize("mask", MASKS)
def test_training_loss_is_the_mean_over_real_tokens(mask):
    ids = windows_of_text()
    attention_mask = MASKS[mask](ids)
    module = CausalLMModule(tiny_llama())
    module.log = lambda *args, **kwargs: None

    windows = slow_losses(module(ids, attention_mask).logits, ids, attention_mask)
    loss = module.training_step({"input_ids": ids, "attention_mask": attention_mask}, 0)
    assert loss.item() == pytest.approx(fmean(chain.from_iterable(windows)), rel=1e-5)


def test_training_uses_the_labels_of_a_batch():
    ids = windows_of_text()
    labels = torch.full_like(ids, -100)
    labels[0, 5] = ids[0, 5]
    module = CausalLMModule(tiny_llama())
    module.log = lambda *args, **kwargs: None
    expected = -module(ids).logits[0, 4].log_softmax(-1)[ids[0, 5]].item()
    loss = module.training_step({"input_ids": ids, "labels": labels}, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_calibration_runs_all_blocks_and_no_head():
    model = tiny_llama()
    calls = []
    for name, part in {"last": model.model.layers[-1], "head": model.lm_head}.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    module = CausalLMModule(model)
    for batch in (windows_of_text(), [windows_of_text()], {"input_ids": windows_of_text()}):
        assert module.calibration_step(batch) is None
    assert calls == ["last"] * 3


@pytest.mark.parametrize("tied", [False, True])
def test_saves_an_ordinary_folder(tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    folder = tmp_path / "new" / "model"
    CausalLMModule(model, tiny_tokenizer()).save_pretrained(folder)

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(folder)("w3 w7").input_ids == [3, 7]
    assert [file.suffix for file in folder.iterdir() if file.stat().st_size > 20_000] == [
        ".safetensors"
    ]


def test_overwrites_the_folder_that_it_was_loaded_from(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path))
    assert module.model.training
    assert module.tokenizer is None
    module.model.lm_head.weight.data.zero_()
    module.save_pretrained(tmp_path, overwrite=True)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), module.model)


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_converts_the_dtype(tmp_path, dtype):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert CausalLMModule(tmp_path).model.dtype == torch.bfloat16
    for model in (tmp_path, tiny_llama()):
        module = CausalLMModule(model, dtype=dtype)
        assert module.model.dtype == torch.float16
        assert module.hparams.dtype == "float16"


def test_a_dtype_in_yaml_stays_a_name():
    parser = ArgumentParser()
    parser.add_class_arguments(CausalLMModule, "model")
    parsed = parser.parse_string("model: {model: folder, dtype: bfloat16}")
    assert parsed.model.dtype == "bfloat16"


def test_loads_from_a_checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    module = CausalLMModule(str(tmp_path / "model"), lr=0.5)
    module.model.lm_head.weight.data.zero_()
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(again, module)
    assert again.lr == 0.5


def test_objects_are_no_hyperparameters():
    saved = CausalLMModule(tiny_llama(), tiny_tokenizer()).hparams
    assert not {"model", "tokenizer"} & saved.keys()
