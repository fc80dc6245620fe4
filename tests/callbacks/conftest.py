"""One thread, for all tests of the callbacks."""

from support.callbacks import one_thread

__all__ = ["one_thread"]
