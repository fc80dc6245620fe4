"""A model that keeps a lock from one unit to the next ends with an explanation, and a slow one runs to its end."""

import threading
import time

import pytest
from support.chains import Chain, Mlp, route, vectors

from wanda_lightning import prune
from wanda_lightning.calibration import batch_thread


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(batch_thread, "IDLE_SECONDS", 0.2)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Locked(Chain):
    """Holds a lock around all its blocks."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_a_lock_around_the_units_is_named(sequential):
    model = Locked(Mlp(), Mlp())
    first = "blocks.0" if sequential == "block" else r"blocks.0\.\w+"
    message = (
        rf"batch 1 has waited for 0\.2 seconds before the first unit .* inside the model: batch 0 at {first}\. Use"
    )
    with pytest.raises(ValueError, match=rf"^sequential must be 'none' for this model, .*{message}"):
        prune(model, vectors(3), sequential=sequential, skip=["head"], progress=False)
    assert not any("forward" in vars(module) for module in model.modules())
    report = prune(model, vectors(3), sequential="none", skip=["head"], progress=False)
    assert report.sparsity == 0.5


def test_a_lock_that_is_taken_between_units():
    lock = threading.Lock()
    model = Chain(Mlp(), Mlp(), Mlp(), glue=lambda index: lock.acquire() if index == 1 else None)
    message = r"batch 1 has waited for 0\.2 seconds after first without computing anything, .*: batch 0 at second\."
    with pytest.raises(ValueError, match=message):
        route(model, vectors(2), model.blocks, names=["first", "second", "third"])
    lock.release()
    time.sleep(0.1)  # the thread that waited ends at its next unit


def test_a_model_that_computes_for_long_is_not_ended(monkeypatch):
    monkeypatch.setattr(batch_thread, "IDLE_SECONDS", 0.6)  # a busy machine may give it no time for a while

    def compute():
        end = time.process_time() + 1.5
        while time.process_time() < end:
            pass

    model = Chain(Mlp(), Mlp(), glue=lambda index: compute() if index == 1 else None)
    assert route(model, vectors(2), model.blocks) == [(0, [0, 1]), (1, [0, 1])]
