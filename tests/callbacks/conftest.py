"""One thread, and no advice of Lightning, for all tests of the callbacks."""

import pytest
from support.callbacks import ADVICE, one_thread
from support.data import few_digits

__all__ = ["few_digits", "one_thread"]


def pytest_itemcollected(item):
    item.add_marker(pytest.mark.filterwarnings(*(f"ignore:.*{message}" for message in ADVICE)))
