"""The loop: all samples wait at one block or layer after the other, where it is observed and changed.

It knows neither masks nor widths: zeros, hidden units and experts are three functions on it, and what changes the
weights in another way can be a fourth (docs/own_method.md).
"""

from wanda_lightning.calibration.observer import Observation as Observation, Observer as Observer
from wanda_lightning.loop.plan import Plan as Plan, make_plan as make_plan
from wanda_lightning.loop.run import Run as Run
from wanda_lightning.loop.steps import (
    begin as begin,
    pruning as pruning,
    visit_stops as visit_stops,
)
