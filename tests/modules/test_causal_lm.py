"""The language model module against slow loops and plain Hugging Face."""

import pytest
import torch
from jsonargparse import ArgumentParser
from support.callbacks import same, trainer
from support.modules import MASKS, slow_perplexity, tiny_llama, tiny_tokenizer, windows_of_text
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from wanda_lightning.modules import CausalLMModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*but have no `val_dataloader`"
)


@pytest.mark.parametrize(("batch_size", "mask"), list(zip((3, 1, 3), MASKS, strict=True)))
def test_validate_and_test_equal_the_slow_loop(batch_size, mask):
    model = tiny_llama()
    ids = windows_of_text()
    attention_mask = MASKS[mask](ids)
    with torch.no_grad():
        expected = slow_perplexity(
            model(ids, attention_mask=attention_mask).logits, ids, attention_mask
        )
    if attention_mask is None:
        windows = [{"input_ids": row} for row in ids]
    else:
        windows = [
            {"input_ids": i, "attention_mask": m} for i, m in zip(ids, attention_mask, strict=True)
        ]
    module = CausalLMModule(model)
    loader = DataLoader(windows, batch_size=batch_size)
    measured = trainer().validate(module, loader, verbose=False) + trainer().test(
        module, loader, verbose=False
    )
    expected = pytest.approx(expected, rel=1e-5)
    assert measured == [{"val_perplexity": expected}, {"test_perplexity": expected}]
    losses = torch.cat(trainer().predict(module, loader))
    assert losses[~losses.isnan()].mean().exp().item() == expected
    assert model.training
    with torch.no_grad():  # outside the inference mode of the loops
        module.val_perplexity.update(
            model(ids, attention_mask=attention_mask).logits, ids, attention_mask
        )
    assert module.val_perplexity.compute().item() == expected


def test_several_dataloaders_have_a_perplexity_each():
    module = CausalLMModule(tiny_llama())
    ids = windows_of_text()
    loaders = [
        DataLoader([{"input_ids": row} for row in part], batch_size=2)
        for part in (ids[:3], ids[3:])
    ]
    alone = [
        trainer().validate(module, loader, verbose=False)[0]["val_perplexity"] for loader in loaders
    ]
    for loop, name in (("validate", "val_perplexity"), ("test", "test_perplexity")):
        run = trainer()
        getattr(run, loop)(module, loaders, verbose=False)
        measured = {key: float(value) for key, value in run.callback_metrics.items()}
        assert measured == {name: alone[0], f"{name}/1": alone[1]}
        assert [list(result) for result in getattr(trainer(), loop)(module, loaders)] == [
            [name],
            [f"{name}/1"],
        ]
    first, second = trainer().predict(module, loaders)
    assert [
        torch.cat(first).mean().exp().item(),
        torch.cat(second).mean().exp().item(),
    ] == pytest.approx(alone)


def test_an_interrupted_loop_does_not_change_the_next_one():
    module = CausalLMModule(tiny_llama())
    ids = windows_of_text()
    (expected,) = trainer().validate(module, DataLoader(ids[3:]), verbose=False)
    bad = DataLoader([*ids[:3], torch.full_like(ids[0], 128)])
    for interrupted in (bad, [DataLoader(ids[:3]), bad]):
        with pytest.raises(ValueError, match="input_ids must be"):
            trainer().validate(module, interrupted, verbose=False)
        (run := trainer()).validate(
            module, [DataLoader(ids[3:]), DataLoader(ids[3:])], verbose=False
        )
        assert {float(value) for value in run.callback_metrics.values()} == set(expected.values())


@pytest.mark.parametrize("mask", MASKS)
def test_training_loss_is_the_mean_over_real_tokens(mask):
    model = tiny_llama()
    ids = windows_of_text()
    attention_mask = MASKS[mask](ids)
    logits = model(ids, attention_mask=attention_mask).logits
    losses = [
        -logits[w, t].log_softmax(-1)[ids[w, t + 1]].item()
        for w in range(7)
        for t in range(23)
        if attention_mask is None or (attention_mask[w, t] and attention_mask[w, t + 1])
    ]
    module = CausalLMModule(model)
    module.log = lambda *args, **kwargs: None
    loss = module.training_step({"input_ids": ids, "attention_mask": attention_mask}, 0)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    labels = torch.full_like(ids, -100)  # of the batch
    labels[0, 5] = ids[0, 5]
    loss = module.training_step(
        {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}, 0
    )
    assert loss.item() == pytest.approx(-logits[0, 4].log_softmax(-1)[ids[0, 5]].item(), rel=1e-5)


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
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    CausalLMModule(model, tiny_tokenizer()).save_pretrained(tmp_path / "new" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    assert same(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "model")("w3 w7").input_ids == [3, 7]
    large = [
        file.suffix
        for file in (tmp_path / "new" / "model").iterdir()
        if file.stat().st_size > 20_000
    ]
    assert large == [".safetensors"]
    again = CausalLMModule(str(tmp_path / "new" / "model"))
    assert again.model.training
    assert again.tokenizer("w3 w7").input_ids == [3, 7]


def test_overwrites_the_folder_that_it_was_loaded_from_and_converts_the_dtype(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path))
    assert module.tokenizer is None
    assert module.model.dtype == torch.bfloat16
    with torch.no_grad():
        module.model.lm_head.weight.zero_()
    module.save_pretrained(tmp_path, overwrite=True)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), module.model)
    assert CausalLMModule(str(tmp_path), dtype="float32").model.dtype == torch.float32
    assert CausalLMModule(tiny_llama(), dtype="float16").model.dtype == torch.float16


def test_a_dtype_of_torch_equals_its_name(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for model in (tiny_llama(), tmp_path):
        module = CausalLMModule(model, dtype=torch.bfloat16)
        assert module.model.dtype == torch.bfloat16
        assert module.hparams.dtype == "bfloat16"


def test_a_dtype_in_yaml_stays_a_name():
    parser = ArgumentParser()
    parser.add_class_arguments(CausalLMModule, "model")
    parsed = parser.parse_string("model: {model: folder, dtype: bfloat16}")
    assert parsed.model.dtype == "bfloat16"


def test_loads_from_a_checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    module = CausalLMModule(str(tmp_path / "model"), lr=0.5)
    with torch.no_grad():
        module.model.lm_head.weight.zero_()
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(again, module)
    assert again.lr == 0.5
    assert (
        set(CausalLMModule(tiny_llama(), tiny_tokenizer()).hparams) & {"model", "tokenizer"}
        == set()
    )
