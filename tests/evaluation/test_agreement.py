"""The predictions of a pruned model beside the dense ones, against plain loops over all predictions."""

import weakref
from statistics import mean, stdev

import pytest
import torch
from support.chains import hooks
from support.modules import MASKS, tiny_llama, windows_of_text
from support.reference import divergence
from torch import nn
from torch.nn import functional as F

from wanda_lightning.evaluation import agreement
from wanda_lightning.evaluation.agreement import Agreement


def language_model(seed=0):
    """A model whose predictions differ enough for float32."""
    return tiny_llama(seed, initializer_range=0.3)


def without_half(model):
    """Set a half of some matrices to zero, in place."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.shape[1] > 8:
            parameter.data[:, ::2] = 0
    return model


def compared(dense, pruned, batches, **options):
    """What is measured on batches; both models may be the same object, which is pruned in between."""
    agreement = Agreement(**options)
    for make, watching in ((dense, agreement.storing), (pruned, agreement.comparing)):
        model = make()
        with watching(model) as after_batch, torch.no_grad():
            for index, batch in enumerate(batches):
                model(**batch) if isinstance(batch, dict) else model(batch)
                after_batch(batch, index, 0)
        assert not hooks(model)
    return agreement.metrics()


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
    """The divergence of a row of logits, of which those of impossible classes are minus infinity."""
    possible = dense > -torch.inf
    return divergence(pruned[possible].double(), dense[possible].double(), reduction="sum").item()


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
    monkeypatch.setattr(agreement, "_LOGITS_AT_ONCE", 5 * 128)
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
        tokens = [value for values in windows.values() for value in values]
        assert measured[name] == pytest.approx(mean(tokens), rel=1e-4)
        assert measured["predictions"] == len(tokens)
        # The ratio of two sums over windows; for windows of one length, the deviation of their means.
        residuals = [sum(values) - mean(tokens) * len(values) for values in windows.values()]
        variance = sum(residual**2 for residual in residuals) / (len(windows) - 1)
        error = (len(windows) * variance) ** 0.5 / len(tokens)
        assert measured.get(f"{name}_stderr", 0) == pytest.approx(error, rel=1e-3)
        if mask == "none":
            means = [mean(values) for values in windows.values()]
            assert error == pytest.approx(stdev(means) / len(means) ** 0.5)
    values = sorted(value for values in divergences.values() for value in values)
    if mask == "none":
        percentile = values[-1 - len(values) // 100]
        assert measured["kl_divergence_p99"] == pytest.approx(percentile, rel=1e-4)
    else:
        assert "kl_divergence_p99" not in measured  # of fewer than 100 predictions


def test_a_classifier_has_one_prediction_for_each_image_and_a_percentile_of_many():
    """The error of the percentile is that of ten groups."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    pruned = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    images = torch.randn(1200, 3, 4, 4)
    measured = compared(lambda: dense, lambda: pruned, list(images.split(100)))
    with torch.no_grad():
        p = dense(images)
        q = pruned(images)
    assert measured["predictions"] == 1200
    assert measured["kl_divergence"] == pytest.approx(divergence(q, p).item(), rel=1e-5)
    assert measured["same_top"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean())
    divergences = list(map(by_hand, p, q))
    percentiles = [sorted(divergences[start::10])[118] for start in range(10)]
    assert measured["kl_divergence_p99"] == pytest.approx(sorted(divergences)[1187], rel=1e-4)
    error = stdev(percentiles) / 10**0.5
    assert measured["kl_divergence_p99_stderr"] == pytest.approx(error, rel=1e-3)


def test_one_window_has_no_error():
    batch = {name: ids[:1] for name, ids in batches_of_text()[0].items()}
    measured = compared(language_model, lambda: language_model(1), [batch])
    assert measured.keys() == {"kl_divergence", "same_top", "predictions"}


def test_predictions_that_are_not_finite_stay_so():
    def broken():
        model = language_model()
        model.model.norm.weight.data[:] = float("nan")
        return model

    measured = compared(language_model, broken, batches_of_text())
    assert measured["kl_divergence"] != measured["kl_divergence"]


@pytest.mark.parametrize("choices", [{"tie_word_embeddings": True}, {"dtype": torch.bfloat16}])
def test_other_heads(choices):
    def model():
        return tiny_llama(0, initializer_range=0.3, **choices)

    batches = batches_of_text()
    measured = compared(model, lambda: without_half(model()), batches)
    before = torch.cat(logits_of(model(), batches)).argmax(-1)
    after = torch.cat(logits_of(without_half(model()), batches)).argmax(-1)
    same = (before == after)[:, :-1].double().mean().item()
    assert measured["same_top"] == pytest.approx(same)


def test_models_that_predict_something_else_are_not_compared():
    batches = list(torch.randn(2, 4, 3, 4, 4))
    with pytest.warns(UserWarning, match="the dense model has 5 outputs, and the other one 6"):
        measured = compared(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5)),
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 6)),
            batches,
        )
    assert measured == {}


def test_the_next_forward_pass_finds_no_former_logits_in_memory():
    agreement = Agreement()
    model = language_model()
    batch = batches_of_text()[0]
    for watching in (agreement.storing, agreement.comparing):
        with watching(model) as after_batch, torch.no_grad():
            logits = model(**batch).logits
            former = weakref.ref(logits)
            after_batch(batch, 0, 0)
            del logits
            assert former() is None


class Changed(nn.Module):
    """A language model that changes the outputs of its head, as some families do."""

    def __init__(self, change):
        super().__init__()
        self.model = language_model()
        self.change = change

    def forward(self, input_ids):
        output = self.model(input_ids)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda logits: logits / 4, id="scaled"),
        pytest.param(lambda logits: F.pad(logits[..., 3:], (3, 0), value=-torch.inf), id="masked"),
    ],
)
def test_logits_that_are_not_those_of_the_head(change):
    scaled = Changed(change).eval()
    batches = batches_of_text()
    before = torch.cat(logits_of(scaled, batches))
    measured = compared(lambda: scaled, lambda: without_half(scaled), batches)
    after = torch.cat(logits_of(scaled, batches))
    rows = (logits[:, :-1].flatten(0, 1) for logits in (before, after))
    assert measured["kl_divergence"] == pytest.approx(mean(map(by_hand, *rows)), rel=1e-4)


class Embedder(nn.Module):
    """A model with embeddings of sentences, of which each has several tokens."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.table = nn.Embedding(32, 8)

    def forward(self, input_ids):
        return {"sentence_embedding": self.table(input_ids).mean(dim=1)}


@pytest.mark.parametrize("width", [None, 3])
def test_embeddings_are_compared_by_their_cosine(monkeypatch, width):
    monkeypatch.setattr(Embedder, "truncate_dim", width, raising=False)
    batches = [{"input_ids": torch.arange(12).reshape(3, 4) + start} for start in (0, 7)]
    measured = compared(lambda: Embedder(0), lambda: Embedder(1), batches)
    cosines = [
        F.cosine_similarity(
            Embedder(0)(row[None])["sentence_embedding"][:, :width],
            Embedder(1)(row[None])["sentence_embedding"][:, :width],
        ).item()
        for batch in batches
        for row in batch["input_ids"]
    ]
    assert measured == {
        "cosine": pytest.approx(mean(cosines), abs=1e-6),
        "cosine_stderr": pytest.approx(stdev(cosines) / 6**0.5, rel=1e-4),
        "predictions": 6,
    }


def test_windows_that_do_not_fit_are_not_compared():
    width = tiny_llama(0).config.hidden_size
    for most_bytes, windows in ((4 * 23 * width * 4, 4), (1, 1)):  # at least one
        batches = batches_of_text()
        models = (language_model, lambda: language_model(1))
        measured = compared(*models, batches, most_bytes=most_bytes)
        assert measured["predictions"] == windows * 23


def test_data_sets_are_apart_and_another_model_starts_anew():
    agreement = Agreement()
    watching = (agreement.storing, agreement.comparing, agreement.comparing)
    first, second, _ = batches_of_text()
    for seed, watch in zip((0, 1, 0), watching, strict=True):
        model = language_model(seed)
        with watch(model) as after_batch, torch.no_grad():
            for number, batch in enumerate((first, second)):
                model(**batch)
                after_batch(batch, 0, number)
        if seed == 1:
            assert agreement.metrics(0)["kl_divergence"] != agreement.metrics(1)["kl_divergence"]
    assert agreement.metrics(0)["same_top"] == agreement.metrics(1)["same_top"] == 1
    assert 0 <= agreement.metrics(0)["kl_divergence"] < 1e-6
    assert agreement.metrics(0)["predictions"] == 3 * 23
    assert agreement.metrics(2) == {}
