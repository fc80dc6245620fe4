"""What all tests share."""

import gc
import signal

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from support.forks import IN_ONE_WORKER
from support.pair import Pair

# Before anything imports wanda_lightning.
install_import_hook("wanda_lightning.core", "beartype.beartype")

# A shell that starts the tests in the background makes them ignore Ctrl-C, and nohup makes them ignore SIGHUP; the
# processes that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("tests")


# Fixtures of a module that take seconds: in two workers, they would be made twice.
SLOW = {"dense_and_shrunk", "fits", "image_folders", "shrunk_language_model", "smaller"}


def pytest_collection_modifyitems(items):
    """Run all tests with the two processes in the worker that forks, and those with a slow fixture in one worker."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))  # doctests have none
        if "pair" in fixtures:
            item.add_marker(IN_ONE_WORKER)
        elif fixtures & SLOW:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """Leave the imported libraries out of garbage collections, each of which would take 0.5 s."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Start each test with the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pair():
    """Two processes, started when the first test runs something in them."""
    processes = Pair()
    yield processes
    processes.end()
