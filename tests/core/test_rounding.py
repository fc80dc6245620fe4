"""What counts as equal up to rounding."""

import pytest
import torch

from wanda_lightning.core.rounding import all_same, same_columns

EPS = torch.finfo(torch.float32).eps


def test_most_entries_must_be_close():
    """A huge entry hides others from the norm; loosely, they may differ."""
    old = torch.tensor([1e9, 1.0, 1.0])
    new = torch.tensor([1e9, 2.0, 2.0])
    assert not all_same([old], [new], EPS)
    assert all_same([old], [new], EPS, loosely=True)
    assert not all_same([old], [old * 1.01], EPS, loosely=True)
    assert not all_same([old], [old[:2]], EPS)


@pytest.mark.parametrize(("wrong", "expected"), [(0, True), (9, True), (11, False)])
def test_nine_in_ten_entries_of_columns_must_be_close(wrong, expected):
    """The other entries are small, so that the norm of each column hardly changes."""
    old = torch.full((100, 1), 1e-6)
    old[0] = 1.0
    new = old.clone()
    new[1 : 1 + wrong] *= 2
    assert same_columns(old, new, EPS) is expected


def test_each_column_must_be_the_same():
    """A large column hides a small one from the norm of all entries."""
    old = torch.ones(20, 50)
    old[:, 0] = 1e9
    new = old.clone()
    new[:, 1] = 2
    assert all_same([old], [new], EPS)
    assert not same_columns(old, new, EPS)


def test_infinite_entries_may_be_equal():
    """Masks of attention hold infinity; integers must be equal, and there may be no entries."""
    infinite = torch.tensor([torch.inf, 1.0])
    assert all_same([infinite, torch.ones(0)], [infinite, torch.ones(0)], EPS)
    assert not all_same([torch.tensor([10**6])], [torch.tensor([10**6 + 1])], EPS)
