"""Schedules against their formulas."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st
from support.callbacks import Steps

from wanda_lightning import CubicSchedule, LinearSchedule, OneShot, PruningCallback, WandaPrune


def cubic(progress):
    """Zhu & Gupta 2017, eq. 1, from an initial sparsity of 0 to a final one of 1."""
    initial, final = 0.0, 1.0
    return final + (initial - final) * (1 - progress) ** 3


CURVES = {CubicSchedule: cubic, LinearSchedule: lambda progress: progress}


class TestLaws:
    @pytest.mark.parametrize("kind", [CubicSchedule, LinearSchedule])
    @given(start=st.integers(0, 30), length=st.integers(1, 40), every=st.integers(1, 50))
    def test_stages_are_the_formula_at_each_step(self, kind, start, length, every):
        schedule, end = kind(start, start + length, every), start + length
        expected = [
            (step, CURVES[kind]((step - start) / length))
            for step in range(start + 1, end + 1)
            if (step - start) % every == 0 or step == end
        ]
        assert [step for step, _ in schedule.stages] == [step for step, _ in expected]
        assert [share for _, share in schedule.stages] == pytest.approx([share for _, share in expected], abs=1e-12)
        assert schedule.stages[-1] == (end, 1.0)
        schedule.check()

    @given(data=st.data(), steps=st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).map(sorted))
    def test_share_is_that_of_the_latest_stage(self, data, steps):
        inner = st.lists(st.floats(0.01, 1), min_size=len(steps) - 1, max_size=len(steps) - 1)
        schedule = Steps(*zip(steps, [*sorted(data.draw(inner)), 1.0], strict=True))
        schedule.check()
        due = None
        for step in range(max(steps) + 3):
            for stage, share in schedule.stages:
                if stage == step:
                    due = share
            assert schedule.share(step) == due

    @given(
        st.lists(
            st.tuples(st.integers(-2, 8), st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5, math.nan])),
            min_size=0,
            max_size=4,
        )
    )
    def test_check_accepts_only_stages_that_increase_to_one(self, stages):
        fine = bool(stages) and stages[0][0] >= 0 and stages[-1][1] == 1
        for (step, share), (next_step, next_share) in pairwise(stages):
            fine = fine and step < next_step and share <= next_share
        fine = fine and all(0 < share <= 1 for _, share in stages)
        if fine:
            Steps(*stages).check()
            assert PruningCallback(schedule=Steps(*stages)).schedule.stages == tuple(stages)
        else:
            with pytest.raises(ValueError, match="schedule must have"):
                PruningCallback(schedule=Steps(*stages))

    def test_one_shot(self):
        assert OneShot(7).stages == ((7, 1.0),)
        assert OneShot() == OneShot(0) == WandaPrune().schedule
        assert WandaPrune(at_step=7).schedule == OneShot(7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((4, 4, 1), "end_step must be a whole number of at least 5, but it is 4"),
        ((0, 4, 0), "every must be a whole number of at least 1, but it is 0"),
    ],
)
def test_bad_schedules_are_refused_at_once(values, message):
    with pytest.raises(ValueError, match=message):
        CubicSchedule(*values)
