"""Groups of layers that allocations compare."""

from wanda_lightning.core.allocation.groups import unit_range


def test_the_unit_range():
    assert unit_range({"a": 3.0, "b": 1.0, "c": 2.0}) == {"a": 1.0, "b": 0.0, "c": 0.5}
    assert unit_range({"a": 3.0, "b": 3.0}) == {"a": 0.0, "b": 0.0}
