"""Schedules against their formulas."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st
from support.callbacks import Steps
from support.refusals import refuses

from wanda_lightning import CubicSchedule, LinearSchedule, PruningCallback

# Zhu & Gupta 2017, eq. 1, from an initial sparsity of 0 to a final one of 1.
CURVES = {
    CubicSchedule: lambda progress: 1 + (0 - 1) * (1 - progress) ** 3,
    LinearSchedule: lambda progress: progress,
}


@pytest.mark.parametrize("kind", CURVES)
@given(start=st.integers(0, 30), length=st.integers(1, 40), every=st.integers(1, 50))
def test_stages_are_the_formula_at_each_step(kind, start, length, every):
    schedule = kind(start, start + length, every)
    end = start + length
    steps = [
        step for step in range(start + 1, end + 1) if (step - start) % every == 0 or step == end
    ]
    assert [step for step, _ in schedule.stages] == steps
    assert [share for _, share in schedule.stages] == pytest.approx(
        [CURVES[kind]((step - start) / length) for step in steps], abs=1e-12
    )
    assert schedule.stages[-1] == (end, 1.0)
    schedule.check()


@given(
    st.lists(
        st.tuples(st.integers(-2, 8), st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5, math.nan])),
        min_size=0,
        max_size=4,
    )
)
def test_only_stages_that_increase_to_one_are_accepted_and_share_is_that_of_the_latest(stages):
    fine = (
        bool(stages)
        and stages[0][0] >= 0
        and stages[-1][1] == 1
        and all(0 < share <= 1 for _, share in stages)
    )
    for (step, share), (next_step, next_share) in pairwise(stages):
        fine = fine and step < next_step and share <= next_share
    if not fine:
        with refuses("schedule must have"):
            PruningCallback(schedule=Steps(*stages))
        return
    schedule = PruningCallback(schedule=Steps(*stages)).schedule
    due = None
    for step in range(10):
        due = dict(stages).get(step, due)
        assert schedule.share(step) == due


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((4, 4, 1), "end_step must be a whole number of at least 5, but it is 4"),
        ((0, 4, 0), "every must be a whole number of at least 1, but it is 0"),
    ],
)
def test_bad_schedules_are_refused_at_once(values, message):
    with refuses(message):
        CubicSchedule(*values)
