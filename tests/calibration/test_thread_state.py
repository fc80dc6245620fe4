"""The state of a thread, and the switches of the process, are those of a plain forward pass."""

import contextlib
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

    def see(name, _, args, output):
        seen.setdefault(name, set()).add((args[0].dtype, output.dtype, autocast()))

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    handles = [module.register_forward_hook(partial(see, name)) for name, module in layers]
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


def seen_while_a_model_switches(context, current):
    """What a model and its blocks see in lockstep, and in a plain forward: it is in a context around one of them."""
    seen = []

    class Switching(Chain):
        def forward(self, x):
            seen.append(current())
            x = self.blocks[0](x)
            with context():
                x = self.blocks[1](x)
                seen.append(current())
            return self.blocks[2](x)

    model, never = Switching(*(Mlp(before=lambda: seen.append(current())) for _ in range(3))), Mlp()
    through([model], *vectors(1))
    plain, before = seen.copy(), current()
    seen.clear()
    for _ in travel(model, vectors(1), [*model.blocks, never]):
        assert current() == before
    return seen, plain


@pytest.mark.parametrize("caller", ["cpu", "meta"])
def test_the_default_device_is_that_of_a_plain_forward(caller):
    """PyTorch keeps it for each thread."""
    other = "cpu" if caller == "meta" else "meta"
    with torch.device(caller):
        locked, plain = seen_while_a_model_switches(lambda: torch.device(other), lambda: torch.empty(1).device.type)
    assert locked == plain == [caller, caller, other, other, caller]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_stream_on_an_accelerator():
    side = torch.Stream()
    with torch.Stream():
        locked, plain = seen_while_a_model_switches(lambda: side, torch.accelerator.current_stream)
    assert locked == plain
    assert len(set(plain)) == 2


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
@pytest.mark.parametrize("units", [2, 3])
@pytest.mark.parametrize(
    "context", [partial(default_dtype, torch.float64), partial(sdpa_kernel, SDPBackend.MATH)], ids=["dtype", "sdpa"]
)
def test_process_wide_contexts_around_units_are_undone_and_a_unit_sees_that_of_its_batch(context, units, sequential):
    """Batches enter them one inside the other; the first one leaves while others are inside, or the last one first."""
    seen = []

    class Held(Chain):
        def forward(self, x):
            with context():
                x = through(self.blocks[:units], x)
            return through(self.blocks[units:], x)

    model = Held(*(Mlp(before=lambda i=index: seen.append((i, process_wide()))) for index in range(3)))
    with (
        default_dtype(torch.float32),
        sdpa_kernel(list(SDPBackend.__members__.values())),
    ):  # whatever comes, put it back
        outside = process_wide()
        with context():
            inside = process_wide()
        prune(model, vectors(), sequential=sequential, skip=["head"], progress=False)
        assert process_wide() == outside != inside
    assert set(seen) == {(index, inside if index < units else outside) for index in range(3)}
