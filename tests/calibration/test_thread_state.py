"""The state of a thread, and the switches of the process, are those of a plain forward pass."""

import contextlib
import threading
from functools import partial

import pytest
import torch
from support.chains import Chain, Mlp, through, travel, vectors
from support.zoo import ZOO, run
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanda_lightning import prune


def autocast():
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def precisions(model, act):
    """What each layer sees while `act` runs: type in, type out, autocast."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: seen.setdefault(name, set()).add(
                (args[0].dtype, output.dtype, autocast())
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "head"
    ]
    act()
    for handle in handles:
        handle.remove()
    return seen


OUTER = {
    "none": contextlib.nullcontext,
    "bfloat16": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "float16": partial(torch.autocast, "cpu", dtype=torch.float16),
    "off": partial(torch.autocast, "cpu", enabled=False),
}


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_autocast_is_that_of_a_plain_forward(sequential, outer):
    """The model switches it in the middle of its forward, and the caller may have it on."""
    specimen = ZOO["autocast_inside"]
    model, batches = specimen.build(), specimen.batches()
    with outer(), torch.no_grad():
        plain = precisions(model, lambda: [run(model, batch) for batch in batches])
        before = autocast()
        locked = precisions(model, lambda: prune(model, batches, sequential=sequential, skip=["head"], progress=False))
        assert autocast() == before
    assert locked == plain
    types = {out for layer in locked.values() for _, out, _ in layer}
    assert {torch.float32, torch.bfloat16} <= types


@pytest.mark.parametrize("caller", ["cpu", "meta"])
def test_the_default_device_is_that_of_a_plain_forward(caller):
    """PyTorch keeps it for each thread; the model switches it around its second block."""
    seen = []

    class Switching(Chain):
        def forward(self, x):
            look()
            x = self.blocks[0](x)
            with torch.device("cpu" if caller == "meta" else "meta"):
                x = self.blocks[1](x)
                look()
            return self.blocks[2](x)

    def look():
        seen.append(torch.empty(1).device.type)

    model, never, (batch,) = Switching(*(Mlp(before=look) for _ in range(3))), Mlp(), vectors(1)
    with torch.device(caller):
        through([model], batch)
        plain = seen.copy()
        assert plain[:2] == plain[-1:] * 2 == [caller] * 2 != plain[2:4]
        seen.clear()
        for _ in travel(model, [batch], [*model.blocks, never]):
            assert torch.empty(1).device.type == caller
    assert seen == plain


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def process_wide():
    attention = torch.backends.cuda
    backends = attention.flash_sdp_enabled, attention.mem_efficient_sdp_enabled, attention.math_sdp_enabled
    return torch.get_default_dtype(), *(enabled() for enabled in backends)


@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize(
    "context",
    [partial(default_dtype, torch.float64), partial(sdpa_kernel, SDPBackend.MATH)],
    ids=["default_dtype", "sdpa_kernel"],
)
def test_process_wide_contexts_around_the_units_are_undone(context, sequential):
    """Each batch enters what the one before it has entered, so the last must leave first."""

    class Held(Chain):
        def forward(self, x):
            with context():
                return super().forward(x)

    before = process_wide()
    with context():
        assert process_wide() != before
    with default_dtype(before[0]), sdpa_kernel(list(SDPBackend.__members__.values())):  # whatever comes, put it back
        before = process_wide()
        prune(Held(Mlp(), Mlp()), vectors(3), sequential=sequential, skip=["head"], progress=False)
        assert process_wide() == before


@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("inside", [torch.float64, torch.float32])
def test_a_process_wide_context_that_ends_before_the_last_unit(sequential, inside):
    """The first batch leaves its context while the others are still inside theirs; a unit sees that of its batch."""
    seen = []

    class Held(Chain):
        def forward(self, x):
            with default_dtype(inside):
                look("inside")
                x = self.blocks[1](self.blocks[0](x))
            look("outside")
            return self.blocks[2](x)

    def look(place):
        seen.append((place, torch.get_default_dtype()))

    model = Held(*(Mlp(before=partial(look, place)) for place in ("inside", "inside", "outside")))
    outside = torch.get_default_dtype()
    prune(model, vectors(3), sequential=sequential, skip=["head"], progress=False)
    assert torch.get_default_dtype() == outside
    assert {dtype for place, dtype in seen if place == "inside"} == {inside}
    assert {dtype for place, dtype in seen if place == "outside"} == {outside}


# ---- streams of accelerators


class FakeAccelerator(threading.local):
    """Three devices and the current streams of each thread, as in torch.accelerator. A stream is (device, name)."""

    def __init__(self):
        self.device, self.streams = 0, [(device, "default") for device in range(3)]

    def current_accelerator(self, check_available=False):
        return torch.device("cpu")  # for autocast

    def device_count(self):
        return len(self.streams)

    def current_device_index(self):
        return self.device

    def set_device_index(self, device):
        self.device = device

    def current_stream(self, device=None):
        return self.streams[self.device if device is None else device]

    def set_stream(self, stream):
        self.device, _ = stream
        self.streams[self.device] = stream

    @contextlib.contextmanager
    def stream(self, stream):
        device, before = self.device, self.streams[stream[0]]
        self.set_stream(stream)
        yield
        self.set_stream(before)
        self.device = device

    def state(self):
        return self.device, tuple(self.streams)


def streams(stream, side, current):
    """The streams that the glue and the blocks of a model see, in lockstep and in a plain forward."""
    seen = []

    class Switching(Chain):
        def forward(self, x):
            seen.append(current())
            x = self.blocks[0](x)
            with stream(side):
                x = self.blocks[1](x)
            return self.blocks[2](x)

    model, never = Switching(*(Mlp(before=lambda: seen.append(current())) for _ in range(3))), Mlp()
    through([model], *vectors(1))
    plain = seen.copy()
    for _ in travel(model, vectors(1), [*model.blocks, never]):
        pass
    return seen[len(plain) :], plain


@pytest.mark.parametrize("caller", [(0, "default"), (0, "callers"), (2, "callers")])
@pytest.mark.parametrize("side", [(0, "side"), (1, "side"), (2, "side"), (1, "default")])
def test_the_streams_of_the_caller_and_of_the_model_are_entered(monkeypatch, caller, side):
    fake = FakeAccelerator()
    for name in ("current_accelerator", "device_count", "current_device_index", "set_device_index"):
        monkeypatch.setattr(torch.accelerator, name, getattr(fake, name))
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.accelerator, name, getattr(fake, name))
    with fake.stream(caller):
        outside = fake.state()
        locked, plain = streams(fake.stream, side, fake.state)
        assert fake.state() == outside
    assert locked == plain
    assert outside == plain[0] == plain[1] == plain[3] != plain[2]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_stream_on_an_accelerator():
    with torch.Stream():
        locked, plain = streams(lambda stream: stream, torch.Stream(), torch.accelerator.current_stream)
    assert locked == plain
    assert len(set(plain)) == 2
