"""An attribute of one instance is replaced for a while."""

import pytest
from torch import nn

from wanda_lightning.calibration.patched import patched


def test_an_attribute_is_restored_or_removed():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with patched(module, "forward", 1), patched(module, "in_features", 7):
        assert (module.forward, module.in_features) == (1, 7)
        assert (other.forward, other.in_features) != (1, 7)
        with pytest.raises(KeyError), patched(module, "forward", 2):
            raise KeyError
        assert module.forward == 1
    assert "forward" not in vars(module)
    assert module.in_features == 2
