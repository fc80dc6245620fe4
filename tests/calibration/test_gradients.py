"""The Fisher information that an allocation reads, against autograd by hand."""

import copy
import gc
import weakref
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from support.chains import overrides
from support.pairwise import spread, with_nightly
from support.refusals import refusal
from support.samples import drawn, gradients, split
from support.zoo import ZOO
from torch import nn
from torch.nn import functional as F

from wanda_lightning import Fisher, prune
from wanda_lightning.calibration.recomputing import recomputing
from wanda_lightning.calibration.trees import map_tensors


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
    torch.manual_seed(0)
    model = Residual()
    batches = [torch.randn(3, 5), torch.randn(6, 5)]
    expected = {"first": torch.zeros(5), "second": torch.zeros(5)}
    rows = {"first": torch.zeros(5), "second": torch.zeros(4)}
    for number, x in ((0, batches[0]), (3, batches[1])):
        inner = model.first(x)
        hidden = (x + inner).relu()
        logits = model.second(hidden)
        for name, seen, output in (("first", x, inner), ("second", hidden, logits)):
            for x_of_token, g in zip(
                seen, gradient(logits, labels_of(logits, number), output), strict=True
            ):
                expected[name] += x_of_token.detach() ** 2 * g.square().mean()
                rows[name] += g**2
    got = gradients(model, batches)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].inputs, value)
        torch.testing.assert_close(got[name].rows, rows[name])
        torch.testing.assert_close(got[name].row_weights(), rows[name] / rows[name].mean())


SAMPLED = (
    *("llama_padded", "gpt_oss", "t5", "vit", "convnext", "block_twice", "routed", "expert_list"),
    *("keywords_only", "autocast_inside", "inplace"),
)


@pytest.mark.parametrize("name", with_nightly(SAMPLED, ZOO))
def test_recomputed_blocks_give_the_same_sums(name):
    model = ZOO[name].build().double()
    batches = map_tensors(lambda x: x.double() if x.is_floating_point() else x, ZOO[name].batches())
    expected = gradients(model, batches, recomputed=False)
    random = torch.get_rng_state()
    assert any(sums.rows.any() for sums in expected.values())
    torch.testing.assert_close(gradients(model, batches), expected=expected, rtol=1e-4, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), random)
    assert not overrides(model)


def test_a_convolution_has_a_gradient_at_each_position_and_classes_are_in_dimension_1():
    torch.manual_seed(0)
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
    found = measured(nn.Sequential(stem, conv, nn.ReLU(), head), [x])["1"]
    torch.testing.assert_close(found, expected.view(4, 9).T.flatten(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["llama_padded", "llama_left_padded"])
def test_padding_does_not_count(name):
    model = ZOO[name].build()
    batch = ZOO[name].batches()[0]
    other = batch["input_ids"].where(batch["attention_mask"].bool(), 7)
    torch.testing.assert_close(
        measured(model, [batch]), measured(model, [batch | {"input_ids": other}])
    )


def test_only_the_first_samples_go_backward():
    batches = ZOO["llama"].batches()
    ways = (batches, len(batches[0]["input_ids"])), (batches[:1], 128), (batches, 128)
    reports = [
        prune(ZOO["llama"].build(), x, 0.5, allocation=Fisher(num_samples=n), progress=False)
        for x, n in ways
    ]
    first, alone, every = ([layer.target for layer in report.layers] for report in reports)
    assert first == alone != every


def test_the_bar_expects_the_batches_that_go_backward(capsys):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(2, 8) for _ in range(6)]
    prune(model, batches, 0.5, allocation=Fisher(num_samples=3))
    assert "Backward pass 2/2 done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "samples"), spread(["llama", "llama_padded", "mixtral"], [3, None, 6, 1])
)
def test_the_size_of_the_batches_does_not_matter(name, samples):
    """Also where the limit lies inside a batch; a draw depends on the sample alone."""
    batches = split(ZOO[name].batches(), 8)
    sums = [
        measured(ZOO[name].build().double(), split(batches, size), samples=samples)
        for size in (1, 2, 4, 8)
    ]
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 8), (9,), (4, 5), (3, 3, 3)], ids=str)
def test_samples_with_one_prediction_share_a_pass_and_fill_up_to_the_minimum(sizes):
    model = ZOO["vit"].build()
    images = torch.cat([batch for batch, _ in ZOO["vit"].batches()] * 2)[:9]
    alone = measured(model, [images[:1]])
    runs = []
    trained = torch.is_grad_enabled  # the trial of two samples has no gradients
    handle = model.register_forward_pre_hook(
        lambda _, args: runs.append(len(args[0])) if trained() else None
    )
    batches = list(images.split(sizes))
    torch.testing.assert_close(measured(model, batches, samples=1), alone, rtol=1e-4, atol=1e-7)
    runs.clear()
    some = measured(model, batches, samples=2, predictions=6)
    six = measured(model, batches, samples=6)
    every = measured(model, batches, samples=2, predictions=100)
    assert sum(runs) == 6 + 6 + 9
    assert runs[0] == 1
    handle.remove()
    torch.testing.assert_close(every, measured(model, [images]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(some, six, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (change, "without logits of two or more classes that depend")
            for change in (id, torch.sum, torch.detach)
        ),
        (
            lambda logits: logits * torch.inf,
            "finite predictions, but those of batch 0 (counted from 0) hold NaN",
        ),
    ],
)
def test_without_predictions_it_is_refused(change, message):
    model = ZOO["plain_mlp"].build()
    batches = ZOO["plain_mlp"].batches()
    assert message in refusal(
        model, batches, allocation="fisher", forward=lambda x: change(model(x))
    )


# ---- blocks that run again in the backward pass


def put_nothing(shared, x, layer):
    return layer(x)


def put_into_object(shared, x, layer):
    shared["object"].tensors.append(layer(x))
    return torch.stack(shared["object"].tensors).sum(0)


def put_into_tensor(shared, x, layer):
    shared["tensor"] += layer(x)
    return shared["tensor"].clone()


def put_into_input(shared, x, layer):
    return layer(x.mul_(2))


class Block(nn.Module):
    """Takes keywords, changes what all blocks share, and returns a nested output with a number and indices."""

    def __init__(self, put):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.put = put
        self.calls = 0

    def forward(self, *, x, shared):
        self.calls += 1
        x = x + self.put(shared, x, self.linear).tanh()
        return {"x": x, "count": 3, "largest": x.argmax(-1)}


class Net(nn.Module):
    def __init__(self, *puts):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, puts))

    def forward(self, x):
        x, shared = (
            x.clone(),
            {"object": SimpleNamespace(tensors=[]), "tensor": torch.zeros_like(x)},
        )
        for block in self.blocks:
            output = block(x=x, shared=shared)
            x = output["x"]
            assert (output["count"], output["largest"].dtype) == (3, torch.int64)
        return x


def recomputed_gradients(model, x, blocks):
    model.zero_grad()
    with recomputing(model, blocks):
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("put", "silent"),
    [
        *product((put_into_object, put_into_input), (None, 0, 1)),
        (put_into_tensor, None),
        (put_nothing, None),
    ],
)
def test_gradients_are_those_of_autograd(put, silent, frozen):
    """A frozen block passes gradients through, and may have none."""
    torch.manual_seed(0)
    model = Net(*(put_nothing if index == silent else put for index in range(3))).double()
    model.blocks[:frozen].requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = recomputed_gradients(copy.deepcopy(model), x, [])
    torch.testing.assert_close(recomputed_gradients(model, x, model.blocks), expected)
    assert all(gradient is None or gradient.abs().max() > 0 for gradient in expected)


def test_without_gradients_a_block_runs_once_and_an_error_restores_it():
    model = Net(*[put_nothing] * 3)
    for repeated in (True, False):
        with recomputing(model, model.blocks), torch.set_grad_enabled(repeated):
            output = model(torch.randn(4, 6))
            if repeated:
                output.sum().backward()
    assert [block.calls for block in model.blocks] == [3, 3, 3]
    with pytest.raises(TypeError), recomputing(model, model.blocks):
        model.blocks[0]("no keyword")
    assert not overrides(model)


def test_only_one_block_is_in_memory():
    """The tensors that the graph keeps do not grow with what a block computes inside."""
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 8)) for _ in range(3))
    )
    numbers = []
    for blocks in (model, []):
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        )
        with recomputing(model, blocks), hooks:
            model(torch.randn(16, 8))
        numbers.append(sum(kept))
    assert numbers[0] * 10 < numbers[1]


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_graph(backward):
    """Not even until the next garbage collection, since a graph without a backward pass would never be collected."""
    model = Net(*[put_nothing] * 3)
    held = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, args, output: held.append(weakref.ref(output["x"]))
        )
    gc.collect()
    gc.disable()
    try:
        with recomputing(model, model.blocks):
            output = model(torch.randn(4, 6))
            if backward:
                output.sum().backward()
            del output
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()
