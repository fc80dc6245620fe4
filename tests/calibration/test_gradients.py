"""The Fisher information that an allocation reads, against autograd by hand."""

import pytest
import torch
from support.chains import overrides
from support.mlps import relu_mlp
from support.pairwise import spread, with_nightly
from support.quiet import prune
from support.refusals import refusal
from support.samples import drawn, gradients, split
from support.zoo import ZOO, batches_of, cast, model_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from wanda_lightning import Fisher


def measured(model, batches, samples=None, predictions=0):
    return {
        name: sums.inputs for name, sums in gradients(model, batches, samples, predictions).items()
    }


def labels_of(logits, first):
    """The labels of a batch that begins with sample number `first`, of one prediction each."""
    return torch.cat([drawn(row, first + index) for index, row in enumerate(logits.split(1))])


def gradient(logits, labels, output):
    return torch.autograd.grad(
        F.cross_entropy(logits, labels, reduction="sum"), output, retain_graph=True
    )[0]


class Residual(nn.Module):
    """Changes the input of its first layer, and the output, after they were used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 4)

    def forward(self, x):
        x = x.clone()
        return self.second(x.add_(self.first(x)).relu_())


def test_the_sums_are_those_of_autograd():
    model = Residual()
    batches = [torch.randn(3, 5), torch.randn(6, 5)]
    expected = {"first": torch.zeros(5), "second": torch.zeros(5)}
    rows = {"first": torch.zeros(5), "second": torch.zeros(4)}
    for first_sample, x in ((0, batches[0]), (3, batches[1])):
        inner = model.first(x)
        hidden = (x + inner).relu()
        logits = model.second(hidden)
        labels = labels_of(logits, first_sample)
        for name, inputs, output in (("first", x, inner), ("second", hidden, logits)):
            slopes = gradient(logits, labels, output)
            for token, slope in zip(inputs.detach(), slopes, strict=True):
                expected[name] += token**2 * slope.square().mean()
                rows[name] += slope**2

    sums = gradients(model, batches)
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(sums[name].inputs, value)
        assert_close(sums[name].rows, rows[name])
        assert_close(sums[name].row_weights(), rows[name] / rows[name].mean())


class Normalized(Residual):
    def forward(self, x):
        return F.normalize(super().forward(x))


def test_vectors_have_normal_directions_instead_of_labels():
    model = Normalized()
    x = torch.randn(6, 5)
    inner = model.first(x)
    vectors = F.normalize(model.second((x + inner).relu()))
    generators = [torch.Generator().manual_seed(index) for index in range(6)]
    directions = torch.stack([torch.randn(4, generator=generator) for generator in generators])
    (slopes,) = torch.autograd.grad(vectors, inner, directions)

    sums = gradients(model, [x])

    assert_close(sums["first"].inputs, (x**2).t() @ slopes.square().mean(dim=1))


def test_a_single_column_is_a_number_and_no_class():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    sums = gradients(model, [torch.randn(6, 5)])
    assert sums["0"].inputs.any()


SAMPLED = [
    "llama_padded",
    "gpt_oss",
    "t5",
    "vit",
    "convnext",
    "block_twice",
    "routed",
    "expert_list",
    "keywords_only",
    "autocast_inside",
    "inplace",
]


@pytest.mark.parametrize("name", with_nightly(SAMPLED, ZOO))
def test_recomputed_blocks_give_the_same_sums(name):
    model = model_of(name).double()
    batches = cast(batches_of(name))
    expected = gradients(model, batches, recomputed=False)
    random = torch.get_rng_state()
    assert any(sums.rows.any() for sums in expected.values())
    assert_close(gradients(model, batches), expected=expected, rtol=1e-4, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), random)
    assert not overrides(model)


def test_a_convolution_has_a_gradient_at_each_position_and_classes_are_in_dimension_1():
    stem = nn.Conv2d(3, 4, 1)
    conv = nn.Conv2d(4, 6, 3, stride=2)
    head = nn.Conv2d(6, 5, 1)
    x = torch.randn(2, 3, 7, 7)
    seen = stem(x).detach()
    output = conv(seen)
    logits = head(output.relu()).flatten(2).mT  # (images, places, classes)
    labels = torch.cat([drawn(each, index) for index, each in enumerate(logits)])
    g = gradient(logits.flatten(0, 1), labels, output).flatten(2)  # (images, channels, places)
    expected = (F.unfold(seen, 3, stride=2).square() * g.square().mean(1, keepdim=True)).sum((0, 2))
    assert_close(
        measured(nn.Sequential(stem, conv, nn.ReLU(), head), [x])["1"],
        expected.view(4, 9).T.flatten(),
        rtol=1e-4,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["llama_padded", "llama_left_padded"])
def test_padding_does_not_count(name):
    model = model_of(name)
    batch = batches_of(name)[0]
    other = batch["input_ids"].where(batch["attention_mask"].bool(), 7)
    assert_close(measured(model, [batch]), measured(model, [batch | {"input_ids": other}]))


def test_the_bar_expects_the_batches_that_go_backward(capsys):
    prune(
        relu_mlp(8, 8, 4),
        [torch.randn(2, 8) for _ in range(6)],
        0.5,
        allocation=Fisher(num_samples=3),
        progress=True,
    )
    assert "Backward pass 2/2 done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "samples"), spread(["llama", "llama_padded", "mixtral"], [3, None, 6, 1])
)
def test_the_size_of_the_batches_does_not_matter(name, samples):
    """Also where the limit lies inside a batch; a draw depends on the sample alone."""
    batches = split(batches_of(name), 8)
    sums = [
        measured(model_of(name).double(), split(batches, size), samples=samples)
        for size in (1, 2, 4, 8)
    ]
    for other in sums[1:]:
        assert_close(other, sums[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 8), (9,), (4, 5), (3, 3, 3)], ids=str)
def test_samples_with_one_prediction_share_a_pass_and_fill_up_to_the_minimum(sizes):
    model = model_of("vit")
    images = torch.cat([batch for batch, _ in batches_of("vit")] * 2)[:9]
    alone = measured(model, [images[:1]])
    runs = []
    trained = torch.is_grad_enabled  # the trial of two samples has no gradients
    handle = model.register_forward_pre_hook(
        lambda _, args: runs.append(len(args[0])) if trained() else None
    )
    batches = list(images.split(sizes))
    assert_close(measured(model, batches, samples=1), alone, rtol=1e-4, atol=1e-7)
    runs.clear()
    some = measured(model, batches, samples=2, predictions=6)
    six = measured(model, batches, samples=6)
    every = measured(model, batches, samples=2, predictions=100)
    assert sum(runs) == 6 + 6 + 9
    assert runs[0] == 1
    handle.remove()
    assert_close(every, measured(model, [images]), rtol=1e-4, atol=1e-7)
    assert_close(some, six, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (id, "without logits or vectors that depend"),
        (torch.sum, "without logits or vectors that depend"),
        (torch.detach, "without logits or vectors that depend"),
        (
            lambda logits: logits * torch.inf,
            "finite predictions, but those of batch 0 (counted from 0) hold NaN",
        ),
    ],
)
def test_without_predictions_it_is_refused(change, message):
    model = model_of("plain_mlp")
    assert message in refusal(
        model, batches_of("plain_mlp"), allocation="fisher", forward=lambda x: change(model(x))
    )
