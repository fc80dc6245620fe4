"""Models as users have them: in bfloat16, with impossible classes, with a prompt, and one that reads pairs of texts."""

from contextlib import suppress
from pathlib import Path

import lightning as L
import pytest
import torch
from sentence_transformers import CrossEncoder
from support.embedding import (
    PAIRS,
    SENTENCES,
    save_pairs,
    spearman_by_hand,
    tiny as tiny,
    tiny_folder as tiny_folder,
)
from torch import nn
from transformers import AutoModelForCausalLM

from wanda_lightning import (
    CausalLMModule,
    EmbeddingModule,
    PruningCallback,
    SentenceDataModule,
    TextDataModule,
    UserError,
    prune,
)


@pytest.mark.parametrize("method", ["wanda", "best"])
def test_a_model_in_bfloat16(folder, sparsity, method):
    module = CausalLMModule(folder, dtype="bfloat16")
    data = TextDataModule(module.tokenizer, seqlen=256, num_samples=8, limit=4)
    L.Trainer(callbacks=[PruningCallback(method=method)], logger=False).validate(module, data)
    module.save_pretrained("out/my model")
    saved = AutoModelForCausalLM.from_pretrained("out/my model")
    assert saved.dtype == torch.bfloat16
    assert sparsity(saved.model) == pytest.approx(0.5, abs=0.01)


class Allowed(nn.Module):
    """Makes every third of 300 classes impossible."""

    def forward(self, logits):
        return logits.masked_fill(torch.arange(300) % 3 == 0, -torch.inf)


def test_logits_of_minus_infinity():
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 300)]
    batches = list(torch.randn(8, 64, 64))
    report = prune(nn.Sequential(*layers, Allowed()), batches, 0.5, method="thorough", skip=["4"])
    dense, *_, trained = report.training.passes
    assert trained.held_out < dense.held_out < 10


def test_an_embedding_model_with_a_prompt_is_measured_as_encode_does(tiny):
    tiny.prompts["question"] = "the old man sees the house ! "
    tiny.default_prompt_name = "question"
    data = SentenceDataModule(tiny, SENTENCES, save_pairs(Path("my pairs.csv")))
    (results,) = L.Trainer(logger=False).validate(EmbeddingModule(tiny), data)
    assert results["val_spearman"] == pytest.approx(spearman_by_hand(tiny), abs=1e-3)


def test_a_cross_encoder_is_pruned_or_refused_in_a_sentence(tiny_folder):
    model = CrossEncoder(str(tiny_folder), num_labels=1, device="cpu")
    pairs = [(first, second) for first, second, _ in PAIRS]
    with suppress(UserError):
        assert prune(model, pairs, 0.5).sparsity == 0.5
