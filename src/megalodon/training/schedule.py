"""Learning-rate schedules: pure functions of the step, so that resuming needs no state beyond the step's number.

The shapes with a warm-up and a cosine, linear or constant body are those of the authors' reference implementation;
warm-up-stable-decay adds a flat body with a linear tail.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from megalodon.training.section import Section

ScheduleKind = Literal["cosine", "linear", "constant", "warmup-stable-decay"]


class ScheduleConfig(Section):
    """How the learning rate moves over a run, as ratios of `optimizer.learning_rate`."""

    kind: ScheduleKind = "cosine"
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear growth from init_ratio to 1")
    init_ratio: float = Field(default=1e-4, ge=0, le=1, description="ratio at step 0 when there is a warm-up")
    end_ratio: float = Field(default=0.1, ge=0, le=1, description="ratio at the last step and after it")
    cycles: float = Field(default=1.0, gt=0, description="half periods of the cosine; 1 falls once from 1 to end_ratio")
    decay_steps: int | None = Field(
        default=None, ge=1, description="length of the tail of warmup-stable-decay; a tenth if null"
    )


def learning_rate_ratio(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of update number `step` (0 is the first), divided by the peak learning rate.

    Past `total_steps` the falling schedules stay at `end_ratio`.

    Raises:
        ValueError: if `step` is negative.
    """
    if step < 0:
        raise ValueError(f"step must be 0 or more, not {step}")
    if step < config.warmup_steps:
        return config.init_ratio + step * (1.0 - config.init_ratio) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    begin = config.warmup_steps
    if config.kind == "warmup-stable-decay":
        begin = max(begin, total_steps - decay_length(total_steps, config))
    if step > total_steps or begin >= total_steps:
        return config.end_ratio
    progress = max(0.0, (step - begin) / (total_steps - begin))
    if config.kind == "cosine":
        return config.end_ratio + 0.5 * (1.0 - config.end_ratio) * (1.0 + math.cos(math.pi * progress * config.cycles))
    return 1.0 - progress * (1.0 - config.end_ratio)


def decay_length(total_steps: int, config: ScheduleConfig) -> int:
    """Steps in the tail of warm-up-stable-decay: `decay_steps`, or a tenth of the run."""
    return config.decay_steps if config.decay_steps is not None else max(1, total_steps // 10)


def schedule_problems(config: ScheduleConfig, total_steps: int) -> list[str]:
    """What is contradictory in a schedule for a run of `total_steps`, one sentence each; empty when all is well."""
    problems = []
    if config.warmup_steps >= total_steps:
        problems.append(f"schedule.warmup_steps: {config.warmup_steps} must be less than run.steps ({total_steps})")
    if config.kind == "warmup-stable-decay":
        if config.decay_steps is not None and config.warmup_steps + config.decay_steps > total_steps:
            problems.append(
                f"schedule.decay_steps: {config.decay_steps} with warmup_steps {config.warmup_steps} "
                f"exceeds run.steps ({total_steps})"
            )
    elif config.decay_steps is not None:
        problems.append(f"schedule.decay_steps: belongs to kind warmup-stable-decay, not to {config.kind}; remove it")
    if config.cycles != 1.0 and config.kind != "cosine":
        problems.append(f"schedule.cycles: belongs to kind cosine, not to {config.kind}; remove it")
    return problems
