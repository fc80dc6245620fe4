"""What surrounds the blocks of a model is kept apart for each batch; what it keeps elsewhere is noticed."""

import logging
from contextvars import ContextVar
from functools import partial
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from support.callbacks import zeros
from support.layers import assert_same, rng
from support.pairwise import with_nightly
from support.quiet import prune, shrinks, zero_units
from support.refusals import refusal
from torch import nn
from torch.overrides import TorchFunctionMode

WIDTH = 16


class Block(nn.Module):
    """Computes `x + down(gelu(up(x * scale)) * gain)`; the hooks `before` and `after` are the model's own code."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.before = before
        self.after = after

    def forward(self, x, scale=1.0, gain=1.0):
        if self.before is not None:
            scale = self.before(x)
        x = x + self.down(F.gelu(self.up(x * scale)) * gain)
        if self.after is not None:
            self.after(x)
        return x


def deviation(x):
    """Of each sample, so that a batch can be split."""
    return x.std(dim=(1, 2), keepdim=True)


class Helper(nn.Module):
    """Keeps what it computes, in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        self.scale = 1 / deviation(x)


class Net(nn.Module):
    """Three blocks and a head, which `run(model, x)` calls."""

    def __init__(self, run, before=None, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        bound = [hook and partial(hook, self) for hook in (before, after)]
        self.blocks = nn.ModuleList(Block(*bound) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)
        self.helper = Helper()

    def forward(self, x):
        return self.head(self.run(self, x))


def batches():
    """Batches on different scales, so that masks show what one batch gets from another."""
    generator = rng(1)
    return [(1 + index) * torch.randn(3, 5, WIDTH, generator=generator) for index in range(4)]


# ---- models and their twins, which compute the same without anything around their blocks


def in_order(model, x):
    for block in model.blocks:
        x = block(x)
    return x


def with_scale(model, x):
    scale = 1 / deviation(x)
    for block in model.blocks:
        x = block(x, scale)
    return x


def writing(model, x):
    return in_order(model, x.sub_(x[..., :1]).div_(deviation(x)))


def not_writing(model, x):
    x = x - x[..., :1]
    return in_order(model, x / deviation(x))


SCALE = ContextVar("scale")  # without a default: reading it in another context raises LookupError


def set_variable(model, x):
    SCALE.set(1 / deviation(x).detach())


def with_variable(model, x):
    set_variable(model, x)
    return in_order(model, x)


def with_next_scale(model, x):
    scale = 1 / deviation(x)
    for block in model.blocks:
        x = block(x, scale)
        scale = 1 / deviation(x).detach()
    return x


class Gain(TorchFunctionMode):
    """Multiplies what GELU returns."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * self.gain if func is F.gelu else result


def in_modes(model, x):
    gain = deviation(x)
    for number, block in enumerate(model.blocks, 1):
        with Gain(number * gain):
            x = block(x)
    return x


def with_gains(model, x):
    gain = deviation(x)
    for number, block in enumerate(model.blocks, 1):
        x = block(x, 1.0, number * gain)
    return x


def set_attribute(model, x):
    model.scale = 1 / deviation(x)


def with_attribute(model, x):
    set_attribute(model, x)
    return in_order(model, x)


MODELS = {
    "writes into its batch": ([writing], [not_writing]),
    "variable of a block": (
        [with_variable, lambda model, x: SCALE.get(), set_variable],
        [with_next_scale],
    ),
    "a mode for each block": ([in_modes], [with_gains]),
}
"""By name: what a model runs, and what its blocks run before and after; the same for its twin."""

CHOICES = {
    "none": {"sequential": "none"},
    "layer": {"sequential": "layer"},
    "block": {"sequential": "block"},
    "best": {"method": "best"},
    "owl": {"allocation": "owl"},
    "units": {"units": 0.5},
    "reconstruct": {"recovery": "reconstruct", "sequential": "block"},
}


# Two ways to wait for each model, and one of the other choices.
SAMPLE = [
    *product(MODELS, ["layer", "block"]),
    *zip(
        MODELS,
        cycle(["best", "units", "owl", "none", "reconstruct"]),
        strict=False,
    ),
]


@pytest.mark.parametrize(("name", "choices"), with_nightly(SAMPLE, product(MODELS, CHOICES)))
def test_what_surrounds_the_blocks_of_a_batch_is_its_own(name, choices, caplog):
    model, twin = (Net(*code) for code in MODELS[name])
    given = batches()
    change = zero_units if shrinks(CHOICES[choices]) else prune
    with caplog.at_level(logging.WARNING):
        change(model, given, **CHOICES[choices])
    change(twin, batches(), **CHOICES[choices])
    assert_same(zeros(model), zeros(twin))
    assert_same(given, batches())
    assert "each batch runs whole" not in caplog.text


# ---- what a model keeps elsewhere, where only the latest batch finds its own


def with_buffer(model, x):
    model.helper.scale.copy_(1 / deviation(x[:1]).flatten())
    return in_order(model, x)


KEPT = {}


def with_dictionary(model, x):
    KEPT["scales"] = [1 / deviation(x)]
    return in_order(model, x)


STATEFUL = {
    "attribute": [with_attribute, lambda model, x: model.scale],
    "buffer written in place": [with_buffer, lambda model, x: model.helper.scale],
    "dictionary": [with_dictionary, lambda model, x: KEPT["scales"][0]],
}


def assert_runs_in_one_pass(model, twin, caplog, **choices):
    """The masks are those of plain passes, and the report and a warning say so."""
    with caplog.at_level(logging.WARNING):
        report = prune(model, batches(), **choices)
    prune(twin, batches(), **choices | {"sequential": "none"})
    assert_same(zeros(model), zeros(twin))
    assert report.config["sequential"] == "none"
    assert "since the model keeps something of the batch" in report.notes[0]
    assert report.notes[0] in caplog.text


@pytest.mark.parametrize("choices", ["layer", "block"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_model_that_keeps_state_runs_in_one_pass(name, choices, caplog):
    model, twin = (Net(*STATEFUL[name]) for _ in range(2))
    assert_runs_in_one_pass(model, twin, caplog, **CHOICES[choices])


@pytest.mark.parametrize("sequential", ["layer", "block"])
def test_hooks_may_keep_state_too(sequential, caplog):
    """A sequence of layers of PyTorch, which is not compared unless it has hooks."""

    def build():
        torch.manual_seed(0)
        layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
        model = nn.Sequential(*layers)
        kept = []
        model[0].register_forward_hook(lambda module, args, output: kept.append(output))
        model[4].register_forward_pre_hook(lambda module, args: args[0] + kept[-1])
        return model

    assert_runs_in_one_pass(build(), build(), caplog, sequential=sequential)


@pytest.mark.parametrize("sequential", ["none", "block"])
def test_blocks_that_read_kept_state_are_not_trained(sequential):
    model = Net(*STATEFUL["attribute"])
    message = refusal(model, batches(), recovery="reconstruct", sequential=sequential)
    assert "blocks.1 gets other inputs than in a plain forward pass" in message


def test_a_forward_may_take_keys_from_its_batch():
    class Popping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, 4)

        def forward(self, batch):
            return self.layer(batch.pop("x"))

    model = Popping()
    given = [{"x": x} for x in batches()]
    prune(model, given, method="best", forward=model)
    assert all("x" in batch for batch in given)


def test_a_value_that_one_batch_sets_is_shared():
    """What is made at the first call is made once, for the first batch."""

    def with_reference(model, x):
        if not hasattr(model, "reference"):
            model.reference = deviation(x[:1])
        return in_order(model, x / model.reference)

    model = Net(with_reference)
    prune(model, batches(), sequential="block")
    assert torch.equal(model.reference, deviation(batches()[0][:1]))


@pytest.mark.parametrize("sequential", ["none", "layer", "block"])
def test_gradients_inside_of_a_forward(sequential):
    """Forces are the gradient of an energy, for example; the blocks between lie in the graph."""

    def forces(model, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = model.blocks[1](model.blocks[0](x))
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return model.blocks[2](gradient.detach())

    model = Net(forces)
    report = prune(model, batches(), sequential=sequential, skip=["head"])
    assert len(report.layers) == 6
    assert not report.notes


@pytest.mark.parametrize(
    ("transform", "choices"),
    [("vmap", "none"), ("vmap", "layer"), ("vmap", "block"), ("grad", "layer"), ("grad", "best")],
)
def test_a_transform_around_the_blocks_is_refused_where_it_cannot_work(transform, choices):
    """A batch cannot leave a transform of torch.func for others, and nothing can be read from a tensor of `vmap`."""

    def run(model, x):
        if transform == "vmap":
            return torch.func.vmap(partial(in_order, model))(x)
        return torch.func.grad(lambda y: in_order(model, y).sum())(x)

    message = refusal(Net(run), batches(), **CHOICES[choices])
    assert "torch.func" in message
    assert "skip=" in message
