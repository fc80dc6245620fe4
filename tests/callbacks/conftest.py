"""One thread, and no advice of Lightning, for all tests of the callbacks."""

import pytest
from support.callbacks import one_thread
from support.data import few_digits

__all__ = ["few_digits", "one_thread"]

ADVICE = "does not have many workers", "but have no `val_dataloader`", "The number of training batches"


def pytest_itemcollected(item):
    """Workers would only slow down these tests, and some only train, for a few steps."""
    item.add_marker(pytest.mark.filterwarnings(*(f"ignore:.*{message}" for message in ADVICE)))
