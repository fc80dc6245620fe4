"""The facts that the lockstep engine rests on, each against a plain forward pass or a counter."""

import threading
import traceback
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import pytest
import torch
from support.chains import (
    WIDTH,
    Chain,
    EitherWay,
    Mlp,
    hooks,
    overrides,
    route,
    through,
    travel,
    vectors,
)
from support.layers import assert_same
from support.quiet import prune
from support.samples import run_of, samples_of
from support.zoo import batches_of, model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import Stop

# ---- where it stops


@pytest.mark.parametrize("count", [1, 3, 40])
def test_all_batches_stop_once_at_each_unit_with_what_a_plain_forward_brings(count):
    """Through the stops before, with the weights that these had when the batches continued."""
    model = Chain(Mlp(), Mlp(), Mlp())
    batches = vectors(count)
    stops = []
    for stop, calls in travel(model, batches, model.blocks):
        stops.append(stop)
        assert overrides(model) == ["blocks.0", "blocks.1", "blocks.2"]
        model.blocks[stop].down.weight.data.mul_(-0.5)
        assert [call.sample.batch_index for call in calls] == list(range(count))
        for call, x in zip(calls, batches, strict=True):
            assert torch.equal(call.args[0], through(model.blocks[:stop], x))
            assert torch.equal(call.run(), through(model.blocks[: stop + 1], x))
            assert call.kwargs == {}
    assert stops == [0, 1, 2]
    assert overrides(model) == []


def test_batches_that_go_different_ways():
    model = EitherWay(Mlp(), Mlp())
    x = torch.ones(2, 3, WIDTH)
    assert route(model, [x, -x], model.blocks) == [(0, [0]), (1, [0, 1])]


def test_the_head_is_computed_for_one_sample_and_an_error_before_it_does_not_matter():
    """That sample shows whether the model calls a block again."""

    def glue(index):
        if index == 2:
            raise OSError("no more disk")

    model = Chain(Mlp(), Mlp())
    failing = Chain(Mlp(), Mlp(), glue=glue)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    for each in (model, failing):
        assert [stop for stop, _ in route(each, vectors(), each.blocks)] == [0, 1]
    assert seen == [1]


# ---- memory


@pytest.mark.parametrize("way", ["block", "layer", "watched"])
def test_the_activations_of_one_unit_are_held(way):
    """While a stop runs, a batch that has gone on has left its old input behind."""
    alive = weakref.WeakSet()
    most = 0

    class Counted(Mlp):
        def forward(self, x):
            nonlocal most
            y = super().forward(x)
            alive.add(y)
            most = max(most, len(alive))
            return y

    model = Chain(*(Counted() for _ in range(6)))
    observer = Observer(frozenset({"square_sum"}))
    if way == "watched":
        own = run_of(model, vectors(4))
        with torch.no_grad():
            for visit in lockstep(own.plan.blocks_and_layers, own.samples.in_memory(), to_end=True):
                visit.continue_by(partial(observer.watched, visit.stop))
        assert observer.finish(own.plan.whole_model).inputs
    else:
        prune(model, vectors(4), sequential=way, skip=["head"])
    assert most == 4 + 1
    assert len(alive) == 0


# ---- grad mode, inference mode, threads, instance forwards


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_gradients_inside_and_the_callers_mode_outside_all_in_its_thread(outer):
    """With one team of OpenMP's workers."""

    def modes():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            threading.current_thread(),
        )

    seen = set()
    model = Chain(
        *(Mlp(before=lambda: seen.add(modes())) for _ in range(3)),
        glue=lambda index: seen.add(modes()),
    )
    with outer():
        before = modes()
        for _ in travel(model, vectors(), model.blocks):
            assert modes() == before
        assert modes() == before
    assert seen == {(False, outer is torch.inference_mode, threading.current_thread())}


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_batches_and_models_of_inference_mode(sequential):
    """Inside inference mode a model may write into its inputs; outside it could not."""

    class Inference(type(model_of("inplace"))):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    expected, decorated, given = (model_of("inplace") for _ in range(3))
    decorated.__class__ = Inference
    for model in (expected, decorated, given):
        with torch.inference_mode(model is given):
            prune(model, batches_of("inplace"), sequential=sequential)
        assert_same(model, expected)


# ---- endings


@pytest.mark.parametrize(
    "error", [LookupError("boom"), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize("place", ["glue", "stop"])
def test_an_error_leaves_prune_and_nothing_behind(place, sequential, error):
    """It is raised from the second time on."""
    calls = []

    def explode(index=1):
        if index == 1:
            calls.append(index)
        if len(calls) >= 2:
            raise error

    within, around = {"glue": (None, explode), "stop": (explode, lambda index: None)}[place]
    model = Chain(Mlp(), Mlp(before=within), Mlp(), glue=around).train()
    with pytest.raises(type(error)) as caught:
        prune(model, vectors(), sequential=sequential, skip=["head"])
    assert caught.value is error
    assert "explode" in {frame.name for frame in traceback.extract_tb(caught.tb)}
    assert overrides(model) == hooks(model) == []
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


class Careful(Chain):
    """Catches errors of its blocks."""

    kind = Exception
    caught = ()

    def forward(self, x):
        for block in self.blocks:
            try:
                x = block(x)
            except self.kind as error:
                self.caught += (error,)
        self.caught += (x,)


@pytest.mark.parametrize("stops_seen", range(4))
@pytest.mark.parametrize("kind", [Exception, BaseException])
def test_closing_early_ends_all_batches_even_if_a_model_catches_exceptions(kind, stops_seen):
    model = Careful(Mlp(), Mlp(), Mlp())
    model.kind = kind
    visits = lockstep([Stop("", block, ()) for block in model.blocks], samples_of(model, vectors()))
    for _ in range(stops_seen):
        next(visits)
    visits.close()
    assert overrides(model) == list(visits) == []
    assert kind is BaseException or model.caught == ()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_batches_wait_inside_of_functions_of_pytorch():
    class Nested(Chain):
        def forward(self, x):
            with torch.profiler.record_function("blocks"):
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=True)

    model = Nested(Mlp(), Mlp(), Mlp())
    batches = vectors()
    for stop, calls in travel(model, batches, model.blocks):
        for call, x in zip(calls, batches, strict=True):
            assert torch.equal(call.args[0], through(model.blocks[:stop], x))


def test_what_modules_collect_in_a_context_variable_reaches_their_own_batch():
    """As transformers collects the logits of routers, for the loss at the end of the model."""
    collector = ContextVar("collector")
    counts = []

    class Collecting(Chain):
        def forward(self, x):
            collected = []
            collector.set(collected)
            x = through(self.blocks, x)
            counts.append(len(collected))
            return x

    model = Collecting(*(Mlp(before=lambda: collector.get([]).append(1)) for _ in range(3)))
    for _, calls in travel(model, vectors(), model.blocks, to_end=True):
        calls[0].run(on_copies=True)  # one more run, of which the batch knows nothing
    assert counts == [3] * len(vectors())


# ---- the state of a batch is that of a plain forward pass


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


STATES = {
    "autocast": (
        lambda dtype: torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        (None, torch.bfloat16),
        lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    ),
    "device": (torch.device, ("cpu", "meta"), lambda: torch.empty(1).device.type),
    "default dtype": (
        default_dtype,
        (torch.float32, torch.float64),
        torch.get_default_dtype,
    ),
    "attention": (
        sdpa_kernel,
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], SDPBackend.MATH),
        torch.backends.cuda.flash_sdp_enabled,
    ),
}
"""By name: a context manager, two values for it, and what is current."""


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("stops", [1, 2, 3])
@pytest.mark.parametrize("state", STATES)
def test_a_module_sees_the_state_of_its_batch_and_the_caller_its_own(state, stops, order):
    """Batches enter a context one inside the other; the first one leaves while others are inside, or the last one."""
    enter, values, current = STATES[state]
    outer, inner = values[::order]
    batches = vectors()
    seen = set()

    class Held(Chain):
        def forward(self, x):
            with enter(inner):
                x = through(self.blocks[:stops], x)
            return through(self.blocks[stops:], x)

    model = Held(*(Mlp(before=lambda i=index: seen.add((i, current()))) for index in range(3)))
    with enter(outer):
        model(batches[0])
        plain = seen.copy()
        outside = current()
        seen.clear()
        for _, calls in travel(model, batches, model.blocks):
            assert current() == outside
            for call in calls:
                call.run()
        assert current() == outside
    assert seen == plain
    assert {found == outside for _, found in plain} == ({False, True} if stops < 3 else {False})
