"""A model that keeps a lock from one unit to the next is detected and named, and nothing else is taken for one."""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.chains import Chain, Mlp, route, travel, vectors

from wanda_lightning import prune
from wanda_lightning.calibration import stalls


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(stalls, "INTERVAL", 0.03)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Locked(Chain):
    """Takes a lock around all its blocks, in one of several ways."""

    def __init__(self, take, *blocks):
        super().__init__(*blocks)
        self.take = take

    def forward(self, x):
        return self.take(super().forward, x)


def by_with(lock):
    def take(forward, x):
        with lock:
            return forward(x)

    return take


def by_acquire(lock):
    def take(forward, x):
        lock.acquire()
        try:
            return forward(x)
        finally:
            lock.release()

    return take


def by_queue(tokens):
    def take(forward, x):
        token = tokens.get()
        try:
            return forward(x)
        finally:
            tokens.put(token)

    return take


def one_token():
    tokens = queue.Queue()
    tokens.put(object())
    return tokens


WAYS = {
    "with": (lambda: by_with(threading.Lock()), "take"),
    "acquire": (lambda: by_acquire(threading.Lock()), "take"),
    "rlock": (lambda: by_with(threading.RLock()), "take"),
    "semaphore": (lambda: by_with(threading.Semaphore(1)), "take"),
    "condition": (lambda: by_with(threading.Condition()), "take"),
    "queue": (lambda: by_queue(one_token()), "take"),
}


@pytest.mark.parametrize(("make", "function"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_a_lock_around_the_units_is_named(make, function, sequential):
    model = Locked(make(), Mlp(), Mlp())
    with pytest.raises(ValueError, match="sequential must be 'none' for this model: it seems to keep a lock") as caught:
        prune(model, vectors(3), sequential=sequential, skip=["head"], progress=False)
    text = str(caught.value)
    assert "In calibration batch 1, " in text
    assert "test_stalls.py:" in text
    assert f"({function})" in text
    assert "batch 0 at " in text
    assert not any("forward" in vars(module) for module in model.modules())
    report = prune(model, vectors(3), sequential="none", skip=["head"], progress=False)
    assert report.sparsity == 0.5


def test_the_names_of_the_units_are_in_the_message():
    model = Locked(by_with(threading.Lock()), Mlp(), Mlp())
    with pytest.raises(ValueError, match=r"batch 0 at first\."):
        route(model, vectors(2), model.blocks, names=["first", "second"])


def test_a_lock_that_a_unit_takes_again():
    """The unit runs in the scheduler's thread, which does not own the batch's lock: one batch is enough."""
    lock = threading.RLock()
    model = Locked(by_with(lock), Mlp(before=lambda: lock.acquire() and lock.release()), Mlp())
    with pytest.raises(ValueError, match=r"In MainThread, .*test_stalls.py.*batch 0 at Mlp"):
        route(model, vectors(1), model.blocks)


def test_a_lock_that_nobody_releases_ends_too():
    lock = threading.Lock()

    def take(forward, x):
        lock.acquire()
        return forward(x)

    model = Locked(take, Mlp(), Mlp())
    with pytest.raises(ValueError, match="it seems to keep a lock"):
        route(model, vectors(2), model.blocks)
    lock.release()
    time.sleep(0.1)  # the thread that waited ends at its next unit


def wait_for_a_thread():
    thread = threading.Thread(target=time.sleep, args=(0.6,))
    thread.start()
    thread.join()


def wait_for_a_future():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 0.6).result()


@pytest.mark.parametrize(
    "wait",
    [
        lambda: time.sleep(0.6),
        lambda: [x for x in range(3_000_000) if x < 0],
        lambda: [threading.Event().wait(0.05) for _ in range(12)],
        lambda: wait_for_a_thread(),
        lambda: wait_for_a_future(),
    ],
    ids=["sleeping", "computing", "waiting briefly again and again", "a thread", "a future"],
)
def test_a_slow_model_is_no_stall(wait):
    model = Chain(Mlp(), Mlp(before=wait), glue=lambda index: wait() if index == 1 else None)
    assert route(model, vectors(2), model.blocks) == [(0, [0, 1]), (1, [0, 1])]


def test_a_slow_consumer_is_no_stall():
    model, event = Chain(Mlp(), Mlp()), threading.Event()
    for _ in travel(model, vectors(2), model.blocks):
        event.wait(0.6)


def test_a_lock_inside_one_unit_or_between_two_is_none():
    lock = threading.Lock()

    def use():
        with lock:
            time.sleep(0.01)

    model = Chain(Mlp(before=use), Mlp(before=use), glue=lambda index: use())
    assert route(model, vectors(3), model.blocks) == [(0, [0, 1, 2]), (1, [0, 1, 2])]
