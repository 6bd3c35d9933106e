"""The learning-rate schedule: a pure function of the step, so that it needs no state and no resuming."""

from __future__ import annotations

import math
from collections.abc import Callable

from s2moe.config.run import ScheduleConfig


def lr_multiplier(schedule: ScheduleConfig, step: int, steps: int, epoch: int = 0) -> float:
    """Factor of the peak learning rate for the update number `step` (from 0) of `steps`.

    Warm-up is linear and reaches 1 at update `warmup_steps - 1`. Then, by kind:
    - cosine: half a cosine from 1 to `min_lr_ratio`;
    - constant_cooldown: 1 until the last `cooldown_fraction` of the run, and a straight line to `min_lr_ratio`;
    - linear: that straight line from the end of the warm-up on;
    - constant: 1;
    - step: times `step_factor` after every `step_epochs` epochs, of which `epoch` are done.
    A cool-down of one step or less is the last update's, at `min_lr_ratio`.
    The first three arrive at `min_lr_ratio` at the last update, `steps - 1`.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    kind: str = schedule.kind
    if kind == "constant":
        return 1.0
    if kind == "step":
        return float(schedule.step_factor ** (epoch // schedule.step_epochs))  # type: ignore[attr-defined]
    if kind == "cosine":
        start = schedule.warmup_steps
        shape: Callable[[float], float] = math.cos
    else:
        cooldown = round(schedule.cooldown_fraction * steps)
        if kind == "constant_cooldown" and schedule.cooldown_fraction > 0 and cooldown <= 1:
            return schedule.min_lr_ratio if step >= steps - 1 else 1.0
        start = max(schedule.warmup_steps, steps - cooldown)
        shape = _straight
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, steps - 1 - start))
    height = (1 + shape(math.pi * progress)) / 2  # 1 at the start, 0 at the end
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * height


def _straight(angle: float) -> float:
    """The straight line with the end points of a cosine: 1 at 0, -1 at pi."""
    return 1 - 2 * angle / math.pi
