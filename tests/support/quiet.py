"""`prune` and `shrink` as most tests call them: without a progress bar."""

from functools import partial

import wanda_lightning
from wanda_lightning.loop.plan import make_plan
from wanda_lightning.loop.steps import begin
from wanda_lightning.shrink_config import ShrinkConfig
from wanda_lightning.verbs.remove_units import remove_units

prune = partial(wanda_lightning.prune, progress=False)
shrink = partial(wanda_lightning.shrink, progress=False)


def shrinks(choices):
    """Whether choices are those of `shrink`."""
    return not choices.keys().isdisjoint({"units", "experts", "max_size"})


def zero_units(model, batches, units=0.5, forward=None, **choices):
    """Do the first half of `shrink(model, batches, units=...)`: the units become zero, but stay; return the report."""
    (part,) = ShrinkConfig(units=units, **choices).parts
    return remove_units(begin(make_plan(part, model), batches, forward, progress=False))
