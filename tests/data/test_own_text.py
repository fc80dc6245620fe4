"""Text that the model writes: the same draws as a loop without a cache, and what cannot write."""

from types import SimpleNamespace

import pytest
import torch
from support.callbacks import SaveAt, trainer, validate_module
from support.data import byte_tokenizer
from support.modules import tiny_llama
from support.refusals import refuses

from wanda_lightning import CausalLMModule, PruningCallback, TextDataModule, sample_windows

TOKENIZER = SimpleNamespace(bos_token_id=5, eos_token_id=7)


def written_by_hand(model, start, count, new, seed):
    """The tokens of `start`, and those drawn after them for two texts at a time."""
    torch.manual_seed(seed)
    windows = []
    for done in range(0, count, 2):
        ids = torch.tensor([start] * min(2, count - done))
        for _ in range(new):
            with torch.no_grad():
                chances = model(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
        windows.append(ids)
    return torch.cat(windows)


def writer(tokenizer):
    """A model with an embedding for each token."""
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def test_tokens_are_drawn_from_the_predictions():
    model = tiny_llama().double().train()
    model.generation_config.update(eos_token_id=list(range(64)), repetition_penalty=2.0, top_k=3)
    model.lm_head.eval()
    own = model.generation_config
    state = torch.get_rng_state()
    windows = sample_windows(model, TOKENIZER, 5, 12, seed=3, batch_size=2, progress=False)
    assert model.generation_config is own
    assert [name for name, part in model.named_modules() if not part.training] == ["lm_head"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(windows, written_by_hand(model.eval(), [5], 5, 12, 3)[:, 1:])
    others = sample_windows(model, TOKENIZER, 5, 12, seed=4, batch_size=2, progress=False)
    assert not torch.equal(windows, others)


def test_a_tokenizer_without_a_first_token_begins_with_the_last_or_is_refused():
    model = tiny_llama().double()
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=7)
    expected = written_by_hand(model, [7], 2, 4, 0)[:, 1:]
    assert torch.equal(sample_windows(model, tokenizer, 2, 4, progress=False), expected)
    tokenizer.eos_token_id = None
    with refuses("must have a token that begins or ends a text"):
        sample_windows(model, tokenizer, 2, 4)


def test_text_by_the_model_needs_a_trainer():
    with refuses("a Trainer that runs a module with a model, but there is none"):
        TextDataModule(byte_tokenizer(), calibration="self").calibration_dataloader()


def test_the_model_writes_text_for_training_only_once(tmp_path, monkeypatch):
    def fit(**options):
        module = CausalLMModule(writer(tokenizer), tokenizer=tokenizer)
        data = TextDataModule(
            tokenizer, calibration="self", seqlen=8, num_samples=2, train_samples=20, limit=2
        )
        trainer(saving, max_steps=2).fit(module, data, **options)
        return data

    tokenizer = byte_tokenizer()
    saving = SaveAt(tmp_path, 2)
    data = fit()
    assert TextDataModule(tokenizer).state_dict() == {}
    assert torch.equal(data.calibration_windows, data.train_windows[:2])
    monkeypatch.setattr("wanda_lightning.data.text.sample_windows", None)
    assert torch.equal(fit(ckpt_path=tmp_path / "2.ckpt").train_windows, data.train_windows)


def test_the_dense_model_writes_the_text_that_it_is_calibrated_on():
    tokenizer = byte_tokenizer()
    module = CausalLMModule(writer(tokenizer), tokenizer=tokenizer)
    expected = sample_windows(module.model, tokenizer, 9, 16, seed=1, progress=False)
    data = TextDataModule(tokenizer, calibration="self", seqlen=16, num_samples=9, seed=1, limit=4)
    callback = PruningCallback(num_samples=9, method="sparsegpt", recovery="distill")
    validate_module(module, callback, data=data)
    assert torch.equal(data.calibration_windows, expected)
    assert callback.report.sparsity == pytest.approx(0.5, abs=0.01)
