"""The learning-rate schedule at the steps where it turns."""

from __future__ import annotations

import math

import pytest

from s2moe.config.run import ScheduleConfig
from s2moe.training.schedule import lr_multiplier


def values(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [lr_multiplier(schedule, step, steps) for step in range(steps)]


def test_cosine_without_warmup_falls_from_one_to_the_floor() -> None:
    got = values(ScheduleConfig("cosine", 0, min_lr_ratio=0.1), 5)
    assert got == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)])
    assert (got[0], got[-1]) == (1.0, pytest.approx(0.1))


def test_warmup_is_linear_and_never_zero() -> None:
    got = values(ScheduleConfig("cosine", 4, min_lr_ratio=0.0), 9)
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert got[6] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert got[8] == pytest.approx(0.0)


def test_constant_with_cooldown() -> None:
    got = values(ScheduleConfig("constant_cooldown", 2, min_lr_ratio=0.2, cooldown_fraction=0.5), 10)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_no_cooldown_is_constant() -> None:
    assert values(ScheduleConfig("constant_cooldown", 0, cooldown_fraction=0.0), 4) == [1.0] * 4


@pytest.mark.parametrize("kind", ["cosine", "constant_cooldown"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_shortest_runs_stay_in_range(kind: str, warmup: int) -> None:
    for steps in (1, 2, 3):
        assert all(0 <= value <= 1 for value in values(ScheduleConfig(kind, min(warmup, steps), 0.0), steps))
