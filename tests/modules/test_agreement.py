"""The predictions of a pruned model beside the dense ones, against plain loops over all predictions."""

from statistics import mean, stdev

import pytest
import torch
from support.modules import MASKS, tiny_llama, windows_of_text
from support.reference import divergence
from torch import nn
from torch.nn import functional as F

from wanda_lightning.modules import agreement
from wanda_lightning.modules.agreement import Agreement


def language_model(seed=0):
    """A model whose predictions differ enough for float32."""
    return tiny_llama(seed, initializer_range=0.3)


def without_half(model):
    """Set a half of some matrices to zero, in place."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.shape[1] > 8:
            parameter.data[:, ::2] = 0
    return model


def compared(dense, pruned, batches):
    """What is measured on batches; both models may be the same object, which is pruned in between."""
    watched = Agreement()
    for make, is_dense in ((dense, True), (pruned, False)):
        model = make()
        with watched.watching(model, is_dense), torch.no_grad():
            for index, batch in enumerate(batches):
                model(**batch) if isinstance(batch, dict) else model(batch)
                watched.add(batch, index)
    return watched.metrics()


def logits_of(model, batches):
    with torch.no_grad():
        return [model(**batch).logits for batch in batches]


def batches_of_text(mask="none"):
    """Batches of 3, 3 and 1 windows, with padding."""
    ids = windows_of_text()
    attention_mask = MASKS[mask](ids)
    batches = []
    for start in range(0, len(ids), 3):
        rows = slice(start, start + 3)
        batch = {"input_ids": ids[rows]}
        if attention_mask is not None:
            batch["attention_mask"] = attention_mask[rows]
        batches.append(batch)
    return batches


def by_hand(dense, pruned):
    """The divergence of a row of logits."""
    return divergence(pruned.double(), dense.double(), reduction="sum").item()


def predicting(batch):
    """The positions of a batch, as (window, token), whose next token is a token of the window."""
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids))
    for row in range(len(ids)):
        for column in range(ids.shape[1] - 1):
            if real[row, column] and real[row, column + 1]:
                yield row, column


@pytest.mark.parametrize("mask", MASKS)
def test_a_language_model_against_a_loop_over_tokens(mask, monkeypatch):
    monkeypatch.setattr(agreement, "_AT_ONCE", 5 * 128)
    batches = batches_of_text(mask)
    model = language_model()
    before = logits_of(model, batches)
    measured = compared(lambda: model, lambda: without_half(model), batches)
    after = logits_of(model, batches)

    divergences = {}
    same = {}
    for number, (batch, dense, pruned) in enumerate(zip(batches, before, after, strict=True)):
        for row, column in predicting(batch):
            p = dense[row, column]
            q = pruned[row, column]
            divergences.setdefault((number, row), []).append(by_hand(p, q))
            same.setdefault((number, row), []).append(float(p.argmax() == q.argmax()))

    for name, windows in (("kl_divergence", divergences), ("same_top", same)):
        means = [mean(values) for values in windows.values()]
        tokens = [value for values in windows.values() for value in values]
        assert measured[name] == pytest.approx(mean(tokens), rel=1e-4)
        assert measured[f"{name}_stderr"] == pytest.approx(
            stdev(means) / len(means) ** 0.5, rel=1e-4
        )
        assert measured["predictions"] == len(tokens)
    values = sorted(value for values in divergences.values() for value in values)
    assert measured["kl_divergence_p99"] == pytest.approx(values[-1 - len(values) // 100], rel=1e-4)
    assert measured["kl_divergence_p99_stderr"] > 0


def test_the_same_model_agrees():
    measured = compared(language_model, language_model, batches_of_text())
    assert measured["same_top"] == 1
    assert measured["kl_divergence"] == pytest.approx(0, abs=1e-6)


class Scaled(nn.Module):
    """A language model that scales the outputs of its head, as some families do."""

    def __init__(self):
        super().__init__()
        self.model = language_model()

    def forward(self, input_ids):
        return {"logits": self.model(input_ids).logits / 4}


def test_logits_that_are_not_those_of_the_head():
    scaled = Scaled().eval()
    batches = batches_of_text()
    with torch.no_grad():
        before = [scaled(**batch)["logits"] for batch in batches]
    measured = compared(lambda: scaled, lambda: without_half(scaled), batches)
    with torch.no_grad():
        after = [scaled(**batch)["logits"] for batch in batches]
    divergences = [
        by_hand(dense[row, column], pruned[row, column])
        for batch, dense, pruned in zip(batches, before, after, strict=True)
        for row, column in predicting(batch)
    ]
    assert measured["kl_divergence"] == pytest.approx(mean(divergences), rel=1e-4)


def test_a_head_that_is_pruned_is_compared_with_the_dense_head():
    model = language_model()
    batches = batches_of_text()
    before = logits_of(model, batches)

    def pruned():
        model.lm_head.weight.data[:, ::2] = 0
        return model

    measured = compared(lambda: model, pruned, batches)
    after = logits_of(model, batches)
    same = [
        float((dense.argmax(-1) == new.argmax(-1))[:, :-1].sum())
        for dense, new in zip(before, after, strict=True)
    ]
    assert measured["same_top"] == pytest.approx(sum(same) / measured["predictions"])
    assert measured["same_top"] < 1


def test_a_classifier_has_one_prediction_for_each_image():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    pruned = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    batches = list(torch.randn(3, 4, 3, 4, 4))
    measured = compared(lambda: dense, lambda: pruned, batches)
    images = torch.cat(batches)
    p = dense(images)
    q = pruned(images)
    assert measured["predictions"] == 12
    assert measured["kl_divergence"] == pytest.approx(divergence(q, p).item(), rel=1e-5)
    assert measured["same_top"] == (p.argmax(-1) == q.argmax(-1)).float().mean()


class Embedder(nn.Module):
    """A model with embeddings of sentences, of which each has several tokens."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.table = nn.Embedding(32, 8)

    def forward(self, input_ids):
        return {"sentence_embedding": self.table(input_ids).mean(dim=1)}


def test_embeddings_are_compared_by_their_cosine():
    batches = [{"input_ids": torch.arange(12).reshape(3, 4) + start} for start in (0, 7)]
    measured = compared(lambda: Embedder(0), lambda: Embedder(1), batches)
    cosines = [
        F.cosine_similarity(
            Embedder(0)(row[None])["sentence_embedding"],
            Embedder(1)(row[None])["sentence_embedding"],
        ).item()
        for batch in batches
        for row in batch["input_ids"]
    ]
    assert measured == {
        "cosine": pytest.approx(mean(cosines), abs=1e-6),
        "cosine_stderr": pytest.approx(stdev(cosines) / 6**0.5, rel=1e-4),
        "predictions": 6,
    }


def test_batches_that_do_not_fit_are_not_compared(monkeypatch):
    width = tiny_llama(0).config.hidden_size
    monkeypatch.setattr(agreement, "_MOST_BYTES", 3 * 23 * width * 4)  # of the first three windows
    measured = compared(language_model, lambda: language_model(1), batches_of_text())
    assert measured["predictions"] == 3 * 23


def test_data_sets_are_apart_and_another_model_starts_anew():
    watched = Agreement()
    (first, second, _) = batches_of_text()
    for seed, is_dense in ((0, True), (1, False), (0, False)):
        model = language_model(seed)
        with watched.watching(model, is_dense), torch.no_grad():
            for number, batch in enumerate((first, second)):
                model(**batch)
                watched.add(batch, 0, number)
        if seed == 1:
            assert watched.metrics(0)["kl_divergence"] != watched.metrics(1)["kl_divergence"]
    assert watched.metrics(0)["same_top"] == watched.metrics(1)["same_top"] == 1
    assert watched.metrics(0)["predictions"] == 3 * 23
    assert watched.metrics(2) == {}
