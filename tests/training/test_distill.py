"""Training the whole pruned model toward the dense predictions, against AdamW written out by hand."""

import math
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import reference
from support.callbacks import zeros
from support.layers import assert_same, rng
from support.pairwise import spread
from support.quiet import prune
from support.recoveries import (
    AdamByHand,
    assert_close_states,
    pruned_with_and_without,
    some_batches as batches_of_size,
    weights_of,
)
from support.refusals import refusal
from support.zoo import ZOO, batches_of, model_of
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from wanda_lightning import Distill
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.models import find_predictions
from wanda_lightning.training import masked_weights
from wanda_lightning.training.predictions import DenseTarget, next_tokens


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def classifier(dtype=torch.float64):
    torch.manual_seed(0)
    return Classifier().to(dtype)


some_batches = partial(batches_of_size, size=1)


def divergence(model, dense, x):
    return reference.divergence(model(x), dense(x))


def adamw_by_hand(model, dense, report, batches, config, loss_of=divergence):
    """Train with autograd and the update written out; no early stop."""
    pruned = weights_of(report)
    trained = [p for name, p in model.named_parameters() if name in pruned or p.ndim < 2]
    adam = AdamByHand(trained, config.learning_rate, 0.95)
    steps = math.ceil(len(batches) / config.batch_size) * config.passes
    for number in range(1, config.passes + 1):
        order = torch.randperm(len(batches), generator=rng(config.seed + number))
        for chosen in order.split(config.batch_size):
            loss = sum(loss_of(model, dense, batches[index]) for index in chosen) / len(chosen)
            warm = min(1, (adam.steps + 1) / 4)
            adam.step(loss, warm * (1 + math.cos(math.pi * adam.steps / steps)) / 2)


def test_it_is_adamw_on_the_divergence_of_samples_that_are_not_held_out():
    dense = classifier()
    batches = some_batches(10, size=8)
    config = Distill(passes=2, batch_size=9, learning_rate=0.01, seed=3)
    expected, model, report = pruned_with_and_without(dense, batches, recovery=config)
    samples = torch.cat(batches)
    trained = [x[None] for index, x in enumerate(samples) if index % 8 != 7]
    adamw_by_hand(expected, dense, report, trained, config)
    assert_close_states(model, expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        after = divergence(model, dense, samples[7::8])
    assert report.training.passes[2].held_out == pytest.approx(float(after), rel=1e-5)
    assert "on 10 held-out samples, before and after each pass" in report.notes[-1]


def test_of_fewer_than_eight_samples_none_is_held_out():
    report = prune(classifier(), some_batches(7), recovery=Distill(passes=1))
    assert (report.training.trained, report.training.held_out) == (7, 0)
    assert report.training.passes[0].loss is None
    assert "too few samples to hold any out" in report.notes[-1]


@pytest.mark.parametrize(
    ("name", "share"),
    spread(["llama", "llama_padded", "llama_left_padded", "gemma2"], [0.0, 0.5, 1.0]),
)
def test_a_share_of_the_loss_is_the_cross_entropy_of_the_next_token(name, share):
    def loss_of(model, dense, batch):
        ids = batch["input_ids"]
        keep = batch.get("attention_mask", torch.ones_like(ids))[0].bool()
        follows = keep[:-1] & keep[1:]
        predicted = model(**batch).logits[0]
        entropy = F.cross_entropy(predicted[:-1][follows], ids[0, 1:][follows])
        distance = reference.divergence(predicted[keep], dense(**batch).logits[0][keep])
        return share * entropy + (1 - share) * distance

    dense = model_of(name).double()
    samples = [{key: value[:1] for key, value in batch.items()} for batch in batches_of(name)]
    config = Distill(passes=2, batch_size=1, learning_rate=0.01, next_token=share)
    expected, model, report = pruned_with_and_without(dense, samples, recovery=config)
    adamw_by_hand(expected, dense, report, samples, config, loss_of)
    assert_close_states(model, expected, rtol=1e-6, atol=1e-9)


def test_tokens_that_stand_for_images_and_audio_are_not_learned():
    """They are in the vocabulary of some models, which never predict them."""
    config = SimpleNamespace(
        image_token_id=3, video_token_index=5, audio_token_id=None, eos_token_id=6
    )
    ids = torch.tensor([[1, 3, 3, 4, 5, 2, 6]])
    sample = Sample(lambda: None, lambda: None, {"input_ids": ids})
    tokens = next_tokens(torch.zeros(1, 7, 9), sample, config)
    assert tokens.tolist() == [-1, -1, 4, -1, 2, 6, -1]


@pytest.mark.parametrize(
    ("count", "enough", "passes"), [(16, 1, 3), (32, 1, 2), (64, 1, 1), (64, 512, 3)]
)
def test_more_samples_need_fewer_passes(monkeypatch, count, enough, passes):
    """But not if a step has few predictions, as with images."""
    monkeypatch.setattr("wanda_lightning.training.distill._ENOUGH", enough)
    report = prune(classifier(), some_batches(count), 0.5, recovery=Distill(batch_size=1))
    assert len(report.training.passes) == 1 + passes
    assert f"passes={passes}," in report.training.recovery


def test_samples_with_one_prediction_run_together():
    """By default 8 of them make a step; they may come from different batches."""
    model = classifier()
    sizes = []

    def forward(x):
        if torch.is_grad_enabled():
            sizes.append(len(x))
        return model(x)

    prune(model, some_batches(16, size=5), recovery=Distill(passes=1), forward=forward)
    assert sizes == [1] + [8] * 8 + [6]  # the first shows whether there are gradients


@pytest.mark.parametrize(
    ("tokens", "batch_size", "steps", "count"),
    [(8, None, 14, 8), (4, None, 7, 8), (4, 1, 14, 4), (64, 9, 2, 512)],
)
def test_a_window_of_text_is_a_step(tokens, batch_size, steps, count, monkeypatch):
    step = AdamW.step
    taken = []
    monkeypatch.setattr(AdamW, "step", lambda *args: taken.append(step(*args)))
    generator = rng(1)
    batches = [
        {"input_ids": torch.randint(3, 128, (4, tokens), generator=generator)} for _ in range(4)
    ]
    report = prune(
        model_of("llama"), batches, 0.5, recovery=Distill(passes=1, batch_size=batch_size)
    )
    assert len(taken) == steps
    assert f"learning_rate={1e-3 * math.sqrt(count / 512)}," in report.training.recovery


@pytest.mark.parametrize(
    ("losses", "best", "note"),
    [
        ([1.0, 1.2, 0.8, 0.9], 2, "of pass 2 are kept"),
        ([1.0, 1.2, 1.1, 1.3], 0, "from before the training are kept"),
    ],
)
def test_a_pass_that_raises_the_held_out_loss_does_not_end_training(
    monkeypatch, losses, best, note
):
    following = iter(losses)
    weights = []
    model = classifier()

    def evaluate(self, samples, loss):
        weights.append([parameter.clone() for parameter in model.parameters()])
        return next(following)

    monkeypatch.setattr(masked_weights.MaskedWeights, "evaluate", evaluate)
    report = prune(model, some_batches(8), 0.5, recovery=Distill(passes=3))
    assert [each.held_out for each in report.training.passes] == losses
    assert note in report.notes[-1]
    assert_same([*model.parameters()], weights[best])


def test_weights_may_have_any_layout():
    """Fused AdamW ignores strides."""
    model = classifier(torch.float32)
    expected = deepcopy(model)
    weight = model.body[0].weight
    weight.data = weight.t().contiguous().t()
    for pruned in (model, expected):
        prune(pruned, some_batches(4, dtype=torch.float32), recovery=Distill(passes=2))
    assert_close_states(model, expected)


def test_under_autocast_the_dense_predictions_are_those_of_the_head():
    head = nn.Linear(8, 12)
    rows = torch.randn(5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = DenseTarget(rows, head).predictions()
        assert torch.equal(predictions(slice(1, 4)), head(rows[1:4]))
    assert head.weight.dtype == torch.float32


def test_frozen_parameters_and_gradients_are_left_alone():
    model = classifier()
    model.body[0].requires_grad_(False)
    start = deepcopy(model)
    gradient = torch.ones_like(model.body[3].weight)
    model.body[3].weight.grad = gradient
    prune(start, some_batches(4))
    prune(model, some_batches(4), recovery="distill")
    assert_same(model.body[0], start.body[0])
    assert not torch.equal(model.body[3].weight, start.body[3].weight)
    assert model.body[3].weight.grad is gradient
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("body.0.")


def test_other_outputs_are_compared_by_their_squared_error():
    class Regressor(Classifier):
        def forward(self, x):
            return super().forward(x)[:, None].expand(-1, 3, -1) * 2

    def loss_of(model, dense, x):
        return (model(x) - dense(x)).square().mean()

    dense = Regressor().double()
    batches = some_batches(3)
    config = Distill(passes=2, batch_size=2, learning_rate=0.01)
    expected, model, report = pruned_with_and_without(dense, batches, recovery=config)
    adamw_by_hand(expected, dense, report, batches, config, loss_of)
    assert_close_states(model, expected, rtol=1e-6, atol=1e-9)


def test_the_classes_of_a_segmentation_are_in_dimension_1():
    logits = torch.randn(2, 5, 3, 6)
    assert torch.equal(find_predictions({"logits": logits}), logits.movedim(1, -1))


def test_an_interruption_leaves_the_best_weights(monkeypatch, caplog):
    dense = classifier()
    batches = some_batches(16)
    calls = []
    model = deepcopy(dense)
    start = deepcopy(dense)
    step = AdamW.step
    prune(start, batches, 0.5)

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 20:  # in the second pass
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(model, batches, 0.5, recovery=Distill(passes=3, batch_size=1))
    assert caught.value.__notes__[0].startswith("The model is pruned. It holds the best weights")
    assert caught.value.__notes__[0] in caplog.text
    assert torch.equal(model.body[0].weight == 0, start.body[0].weight == 0)
    held_out = torch.cat(batches[7::8])
    assert divergence(model, dense, held_out) < divergence(start, dense, held_out)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_stops():
    class Fragile(Classifier):
        def forward(self, x):
            logits = super().forward(x)
            return logits * math.inf if torch.is_grad_enabled() and bool((x > 2).any()) else logits

    batches = some_batches(16)
    batches[3][0, 0] = 3.0
    start, model, report = pruned_with_and_without(Fragile().double(), batches, recovery="distill")
    assert "was not finite, so training stopped" in report.training.stopped
    assert_same(model, start)


def test_blocks_are_trained_as_by_reconstruct_before():
    choices = {"method": "balanced", "sequential": "block"}
    first = model_of("llama")
    both = model_of("llama")
    batches = batches_of("llama")
    blocks = prune(first, batches, 0.6, recovery="reconstruct", **choices)
    report = prune(
        both, batches, 0.6, recovery=Distill(passes=2, batch_size=1, blocks=True), **choices
    )
    assert [layer.part for layer in report.layers] == [layer.part for layer in blocks.layers]
    assert any(layer.part and layer.part.after < layer.part.before for layer in report.layers)
    assert_same(zeros(first), zeros(both))
    assert report.training.passes[-1].loss < report.training.passes[1].loss


class Headed(Classifier):
    """A language model's interface: the head is known, and has a bias."""

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_bias_of_the_head_and_so_the_dense_predictions_stay(wrapped):
    dense = Headed().double()
    batches = some_batches(4)
    model = deepcopy(dense)
    target = nn.Sequential(model) if wrapped else model
    prune(target, batches, 0.5, skip="*head", recovery=Distill(passes=1, learning_rate=0.1))
    assert torch.equal(model.head.bias, dense.head.bias)
    assert not torch.equal(model.body[0].bias, dense.body[0].bias)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda model: model.requires_grad_(False), "requires_grad is False for each of them"),
        (
            lambda model: model.head.bias.data.fill_(math.nan),
            "finite predictions, but those of batch 0",
        ),
        (
            lambda model: model.register_forward_hook(lambda m, a, out: out.detach()),
            "predictions with gradients",
        ),
        (
            lambda model: model.register_forward_hook(lambda m, a, out: out[:, 0]),
            "gave a tensor of shape (1,)",
        ),
        (lambda model: model.register_forward_hook(lambda m, a, out: "text"), "gave a str"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(break_, message):
    model = classifier()
    break_(model)
    assert message in refusal(model, some_batches(2), recovery="distill")


class Masked(Headed):
    """Sets the logit of a class behind the head."""

    def __init__(self, logit):
        super().__init__()
        self.logit = logit

    def forward(self, x):
        return super().forward(x).index_fill(1, torch.tensor([4]), self.logit)


class Padded(Headed):
    """Adds a logit behind the head."""

    def forward(self, x):
        return torch.cat([super().forward(x), torch.full((len(x), 1), -math.inf)], dim=1)


@pytest.mark.parametrize(
    ("impossible", "other", "choice"),
    [
        # Its probability is 0.
        (Masked(-math.inf), Masked(-1e4), {"method": "thorough"}),
        (Padded(), Headed(), {"recovery": "distill"}),
    ],
)
def test_impossible_classes_do_not_count(impossible, other, choice):
    other.load_state_dict(impossible.state_dict())
    for model in (impossible, other):
        report = prune(model.double(), some_batches(4), 0.5, **choice)
        assert math.isfinite(report.training.passes[-1].loss)
    assert_close_states(impossible, other)


@pytest.mark.parametrize("own_forward", [False, True])
def test_batches_on_a_graph(own_forward):
    models = []
    for on_graph in (True, False):
        model = model_of("llama")
        embed = deepcopy(model.get_input_embeddings()).requires_grad_(on_graph)
        batches = [{"inputs_embeds": embed(batch["input_ids"])} for batch in batches_of("llama")]
        forward = partial(lambda model, batch: model(**batch), model) if own_forward else None
        prune(model, batches, 0.5, method="thorough", forward=forward)
        models.append(model)
        assert embed.weight.grad is None
    assert_same(*models)


def padded():
    batches = [dict(batch) for batch in batches_of("llama_padded")]
    batches[0]["attention_mask"] = batches[0]["attention_mask"].clone()
    batches[0]["attention_mask"][0] = 0
    return batches


def of_inference_mode():
    with torch.inference_mode():
        return [x.clone() for x in some_batches(2)]


@pytest.mark.parametrize(
    ("make", "batches", "trained"),
    [
        (
            ZOO["llama"].build,
            [{"input_ids": torch.arange(2 * length).view(2, length)} for length in (12, 5, 1)],
            6,
        ),
        (ZOO["llama_padded"].build, padded(), 5),  # one sample is all padding
        (classifier, of_inference_mode(), 2),
        (classifier, [some_batches(1)[0], some_batches(1)[0][:0], *some_batches(3)], 4),
    ],
)
def test_odd_batches(make, batches, trained):
    model = make()
    with torch.inference_mode():
        report = prune(model, batches, 0.5, recovery=Distill(passes=1))
    assert report.training.trained == trained
    assert math.isfinite(report.training.passes[1].loss)


def test_a_sparsity_of_0_trains_nothing():
    start, model, report = pruned_with_and_without(
        classifier(), some_batches(4), 0.0, recovery="distill"
    )
    assert report.training is None
    assert_same(model, start)
