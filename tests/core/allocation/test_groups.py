"""Groups of layers that allocations compare."""

import jaxtyping
import pytest

from wanda_lightning.core.allocation import OWL, AlphaPruning
from wanda_lightning.core.allocation.groups import unit_range


def test_the_unit_range():
    assert unit_range({"a": 3.0, "b": 1.0, "c": 2.0}) == {"a": 1.0, "b": 0.0, "c": 0.5}
    assert unit_range({"a": 3.0, "b": 3.0}) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("kind", [OWL, AlphaPruning])
def test_groups_are_blocks_or_layers(kind, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # beartype refuses it before we do
    with pytest.raises(ValueError, match=f"per of {kind.__name__} must be one of block, layer, but it is 'row'"):
        kind(per="row")
