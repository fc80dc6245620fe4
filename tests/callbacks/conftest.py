"""One thread, and no advice of Lightning, for all tests of the callbacks."""

import pytest
import torch
from support.callbacks import WITHOUT_ADVICE
from support.data import few_digits as few_digits


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small operations are slower with more
    yield
    torch.set_num_threads(threads)


def pytest_itemcollected(item):
    item.add_marker(WITHOUT_ADVICE)
