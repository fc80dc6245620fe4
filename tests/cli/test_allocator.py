"""Commands keep the memory that tensors free."""

import resource

import pytest
import torch
from support.forks import run

from wanda_lightning.cli.allocator import keep_freed_memory


def faults(keep):
    """Print how many pages are faulted in when 32 MiB are allocated and freed again and again."""
    if keep:
        keep_freed_memory()
    torch.ones(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**23)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def test_freed_memory_is_used_again():
    default, kept = (int(run(faults, keep).stdout) for keep in (False, True))
    if default < 10 * 2**12:
        pytest.skip("this C library keeps freed memory anyway")
    assert kept < 0.1 * default
