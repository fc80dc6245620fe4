"""A selection is criterion, pattern and sparsity in one object."""

import numpy as np
from support import reference
from support.layers import random_layer, statistics

from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.selection import Selection


def test_it_keeps_what_its_pattern_keeps_of_its_criterions_scores():
    weight, tokens = random_layer()
    scores = reference.wanda(weight.numpy(), tokens.numpy())
    for pattern, sparsity in ((Unstructured(), 0.3), (Unstructured("layer"), 0.7), (NM(2, 4), 0.5)):
        keep = Selection(Wanda(), pattern, sparsity).keep(weight, statistics(tokens, Wanda))
        np.testing.assert_array_equal(keep.numpy(), reference.keep(pattern, scores, sparsity))


def test_selections_are_values():
    assert Selection(Wanda(), NM(2, 4), 0.5) == Selection(Wanda(), NM(2, 4), 0.5)
    assert Selection(Wanda(), NM(2, 4), 0.5) != Selection(Wanda(), NM(1, 4), 0.75)
