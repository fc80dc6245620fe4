"""Distribute the hidden units that become zero over the layers that read them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import UnitLayer
from wanda_lightning.core.patterns import Structured
from wanda_lightning.core.statistics import GradientStatistics
from wanda_lightning.models import RemovableUnits


def unit_sparsities(
    config: PruningConfig, coupled: Mapping[str, RemovableUnits], gradients: Mapping[str, GradientStatistics]
) -> dict[str, float]:
    """Give each layer that reads hidden units the fraction of them that becomes zero."""
    pattern = config.pattern
    assert isinstance(pattern, Structured)
    layers = []
    for name, units in coupled.items():
        scores = gradients[name].units if name in gradients else None
        layers.append(UnitLayer(name, re.sub(r"\d+", "*", name), units.width, scores))
    if config.allocation.reads_gradients:
        layers = [layer for layer in layers if layer.scores is not None]
    found = config.allocation.of_units(layers, config.sparsity, pattern) if layers else {}
    return {layer.name: 1 - pattern.kept(layer.width, found[layer.name]) / layer.width for layer in layers}
