"""The facts that the lockstep engine rests on, each against a plain forward pass or a counter."""

import copy
import os
import signal
import threading
import time
import traceback
import weakref
from contextlib import closing

import pytest
import torch
from support.chains import WIDTH, Chain, Mlp, hooks, overrides, route, through, travel, vectors
from support.samples import as_samples, samples_of
from support.zoo import ZOO, run

from wanda_lightning import prune
from wanda_lightning.calibration import thread_state
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.calibration.unit_stops import watch_units, whole_model_calls
from wanda_lightning.core.solvers import Solver
from wanda_lightning.models import Unit, find_layers
from wanda_lightning.parallel import SINGLE_PROCESS


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# ---- where it stops


@pytest.mark.parametrize("count", [1, 3, 40])
def test_all_batches_stop_once_at_each_unit_with_what_a_plain_forward_brings(count):
    model, batches, units = Chain(Mlp(), Mlp(), Mlp()), vectors(count), []
    for stop in travel(model, batches, model.blocks):
        units.append(stop.unit)
        assert [call.sample.batch_index for call in stop.calls] == list(range(count))
        for call in stop.calls:
            assert torch.equal(call.args[0], through(model.blocks[: stop.unit], batches[call.sample.batch_index]))
            assert call.kwargs == {}
    assert units == [0, 1, 2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("most", [0, thread_state.MOST_IDLE_WORKERS])
def test_waiting_batches_keep_few_workers(monkeypatch, most):
    """OpenMP keeps a team for each thread of a batch that computes between the units."""
    monkeypatch.setattr(thread_state, "MOST_IDLE_WORKERS", most)
    x = torch.randn(2**16, WIDTH)
    model, before = Chain(Mlp(), Mlp(), glue=lambda index: x.exp()), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x.exp()  # the team of this thread
        threads = len(os.listdir("/proc/self/task"))
        for _ in travel(model, vectors(16), model.blocks):
            assert len(os.listdir("/proc/self/task")) <= threads + 16 + (2 * 3 if most == 0 else most)
    finally:
        torch.set_num_threads(before)


def test_a_batch_may_never_reach_a_unit():
    model = ZOO["routed"].build()
    stops = [(0, [0, 1, 2]), (1, [0, 2]), (2, [1]), (3, [0, 1, 2])]
    assert route(model, ZOO["routed"].batches(), model.blocks) == stops


def test_a_unit_that_no_batch_reaches_is_no_stop():
    model, outputs = ZOO["unreached"].build(), []
    batches = ZOO["unreached"].batches()
    runs = [lambda batch=batch: outputs.append(run(model, batch)) for batch in batches]
    with closing(lockstep(as_samples(runs), model.blocks)) as stops:
        assert [stop.unit for stop in stops] == [0, 2]
    # A unit is still to come, so the batches ran to their end: the model's own output is that of a plain forward.
    with torch.no_grad():
        assert all(torch.equal(output, run(model, batch)) for output, batch in zip(outputs, batches, strict=True))


def test_batches_at_different_units():
    class EitherWay(Chain):
        def forward(self, x):
            for block in self.blocks if x.mean() > 0 else reversed(self.blocks):
                x = block(x)
            return x

    model = EitherWay(Mlp(), Mlp())
    there, back = (torch.full((2, 3, WIDTH), value) for value in (1.0, -1.0))
    assert route(model, [there, back], model.blocks) == [(0, [0]), (1, [0, 1])]


def test_a_shared_block_runs_through_the_second_time():
    calls = []
    shared = Mlp(before=lambda: calls.append(threading.current_thread()))
    model, batches = Chain(shared, Mlp(), shared, Mlp()), vectors()
    units = [shared, model.blocks[1], model.blocks[3]]
    for stop in travel(model, batches, units):
        assert [call.sample.batch_index for call in stop.calls] == [0, 1, 2]
        if stop.unit == 2:
            assert len(calls) == 2 * len(batches)
            assert set(calls) == {threading.current_thread()}
            expected = [through([shared, units[1], shared], x) for x in batches]
            assert all(torch.equal(call.args[0], x) for call, x in zip(stop.calls, expected, strict=True))


def test_no_batch_and_no_unit():
    model = Chain(Mlp())
    assert route(model, [], model.blocks) == []
    assert route(model, vectors(), []) == []


def test_the_whole_model_draws_the_batches_one_by_one():
    drawn = []

    def batches():
        for index in range(3):
            drawn.append(index)
            yield as_samples([lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())])[0]

    calls = whole_model_calls(batches())
    assert drawn == []
    for index in range(3):
        call = next(calls)
        assert drawn == list(range(index + 1))
        assert call.run() == (False, False)


# ---- what is computed, and where


def test_one_thread_at_a_time():
    running = threading.Lock()

    def alone():
        assert running.acquire(blocking=False), "two threads run"
        time.sleep(0.001)
        running.release()

    model = Chain(*(Mlp(before=alone) for _ in range(3)), glue=lambda index: alone())
    for stop in travel(model, vectors(6), model.blocks):
        alone()
        for call in stop.calls:
            call.run()


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_heavy_work_is_in_the_schedulers_thread(sequential):
    units, glue = set(), set()
    model = Chain(
        *(Mlp(before=lambda: units.add(threading.current_thread())) for _ in range(3)),
        glue=lambda index: glue.add(threading.current_thread()),
    )
    layers = set()
    for block in model.blocks:
        original = block.up.forward
        block.up.forward = lambda x, original=original: layers.add(threading.current_thread()) or original(x)
    prune(model, vectors(), sequential=sequential, skip=["head"], progress=False)
    scheduler = {threading.current_thread()}
    assert layers == scheduler
    if sequential == "none":
        assert glue == units == scheduler
    else:
        assert len(glue) == 3  # each batch has its own
        assert not glue & scheduler
        assert (units == scheduler) == (sequential == "block")


def test_a_unit_runs_with_the_weights_of_that_moment():
    model, batches = Chain(Mlp(), Mlp(), Mlp()), vectors()
    changed = copy.deepcopy(model)
    for stop in travel(model, batches, model.blocks):
        for call, x in zip(stop.calls, batches, strict=True):
            assert torch.equal(call.args[0], through(changed.blocks[: stop.unit], x))
        first = stop.calls[0]
        dense = first.run()
        for either in (model, changed):
            either.blocks[stop.unit].down.weight.data.mul_(-0.5)
        assert torch.equal(first.run(), through([changed.blocks[stop.unit]], first.args[0]))
        assert not torch.equal(first.run(), dense)


def test_only_batches_park():
    model, batches = Chain(Mlp(), Mlp()), vectors()
    for stop in travel(model, batches, model.blocks):
        assert overrides(model) == ["blocks.0", "blocks.1"]
        for call in stop.calls:
            assert torch.equal(through([model.blocks[stop.unit]], call.args[0]), call.run())
    assert overrides(model) == []


# ---- memory


def watched(model, batches):
    samples = Samples(model, batches, None, None, SINGLE_PROCESS, "a test")
    units, observer = find_layers(model, skip=["head"]).units, Observer(frozenset({"square_sum"}))
    with torch.no_grad():
        for _ in watch_units(units, samples, observer, lambda name: None):
            pass
    assert len(observer.finish(Unit("", None, find_layers(model).layers))) == 12


@pytest.mark.parametrize("way", ["block", "layer", "watched"])
def test_the_activations_of_one_unit_are_held(way):
    """While a unit runs, a batch that has gone on has left its old input behind."""
    alive, most = weakref.WeakSet(), 0

    class Counted(Mlp):
        def forward(self, x):
            nonlocal most
            y = super().forward(x)
            alive.add(y)
            most = max(most, len(alive))
            return y

    model = Chain(*(Counted() for _ in range(6)))
    if way == "watched":
        watched(model, vectors(4))
    else:
        prune(model, vectors(4), sequential=way, skip=["head"], progress=False)
    assert most == 4 + 1
    assert len(alive) == 0


# ---- grad mode, autocast, instance forwards, writing in place


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_gradients_inside_and_the_callers_mode_outside(outer):
    seen = set()

    def look():
        seen.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    model = Chain(*(Mlp(before=look) for _ in range(3)), glue=lambda index: look())
    with outer():
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        for _ in travel(model, vectors(), model.blocks):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode
    assert seen == {(False, outer is torch.inference_mode)}


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_batches_and_models_of_inference_mode(sequential):
    """Inside inference mode a model may write into its inputs; outside it could not."""

    class Inference(type(ZOO["inplace"].build())):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    expected, decorated, given = (ZOO["inplace"].build() for _ in range(3))
    decorated.__class__ = Inference
    prune(expected, ZOO["inplace"].batches(), sequential=sequential, progress=False)
    prune(decorated, ZOO["inplace"].batches(), sequential=sequential, progress=False)
    with torch.inference_mode():
        prune(given, ZOO["inplace"].batches(), sequential=sequential, progress=False)
    for model in (decorated, given):
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_forward_of_the_instance_is_used_and_comes_back():
    model, batches = Chain(Mlp(), Mlp()), vectors()
    original = model.blocks[0].forward

    def doubled(x):
        return 2 * original(x)

    model.blocks[0].forward = doubled
    with torch.no_grad():
        expected = [2 * original(x) for x in batches]
    for stop in travel(model, batches, model.blocks):
        if stop.unit == 1:
            assert all(torch.equal(call.args[0], x) for call, x in zip(stop.calls, expected, strict=True))
    assert overrides(model) == ["blocks.0"]
    assert vars(model.blocks[0])["forward"] is doubled


# ---- endings


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize("error", [Unforeseen("boom"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("place", ["glue", "unit", "solver"])
def test_an_error_leaves_prune_and_nothing_behind(place, sequential, error):
    """It is raised the second time, while other batches are parked."""
    calls = []

    def explode():
        calls.append(1)
        if len(calls) == 2:
            raise error

    glue = {"glue": lambda now: explode() if now == 1 else None}.get(place, lambda now: None)
    model = Chain(Mlp(), Mlp(before=explode if place == "unit" else None), Mlp(), glue=glue).train()

    class Exploding(Solver):
        needs = frozenset()

        def __call__(self, weight, inputs, selection):
            explode()
            return weight, weight != 0

    solver = Exploding() if place == "solver" else "zero_out"
    with pytest.raises(type(error)) as caught:
        prune(model, vectors(), solver=solver, sequential=sequential, skip=["head"], progress=False)
    assert caught.value is error
    assert "explode" in {frame.name for frame in traceback.extract_tb(caught.tb)}
    assert overrides(model) == hooks(model) == []
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("stops_seen", range(4))
def test_closing_early_ends_all_threads(stops_seen):
    model = Chain(Mlp(), Mlp(), Mlp())
    stops = lockstep(samples_of(model, vectors()), model.blocks)
    for _ in range(stops_seen):
        next(stops)
    stops.close()
    assert overrides(model) == []
    assert list(stops) == []


@pytest.mark.parametrize("stops_seen", [1, 2])
@pytest.mark.parametrize("kind", [Exception, BaseException])
def test_a_model_that_catches_exceptions_does_not_swallow_the_ending(kind, stops_seen):
    caught, behind = [], []

    class Careful(Chain):
        def forward(self, x):
            for block in self.blocks:
                try:
                    x = block(x)
                except kind as error:
                    caught.append(error)
            behind.append(x)
            return x

    model = Careful(Mlp(), Mlp())
    stops = lockstep(samples_of(model, vectors()), model.blocks)
    for _ in range(stops_seen):
        next(stops)
    stops.close()
    assert kind is BaseException or caught == behind == []


# ---- Ctrl-C


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("place", ["glue", "unit"])
def test_ctrl_c_ends_at_once(place, sequential):
    """In a unit the sleep itself is cut short; in the model's own code a batch goes on to its next stop."""
    seconds = 0.1 if place == "glue" and sequential != "none" else 60
    timer = threading.Timer(0.15, os.kill, [os.getpid(), signal.SIGINT])

    def nap():
        if not timer.is_alive():
            timer.start()
        time.sleep(seconds)

    # A block is a unit at "block" only; a layer's own forward is one at "layer".
    model = Chain(*(Mlp(before=nap if place == "unit" and sequential != "layer" else None) for _ in range(40)))
    if place == "unit" and sequential == "layer":
        original = model.blocks[0].up.forward
        model.blocks[0].up.forward = lambda x: nap() or original(x)
    if place == "glue":
        model.glue = lambda index: nap()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prune(model, vectors(40), sequential=sequential, skip=["head"], progress=False)
    timer.join()
    assert time.monotonic() - started < 10
    assert overrides(model) in ([], ["blocks.0.up"])
    assert hooks(model) == []
