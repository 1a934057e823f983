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


def length_change(
    config: ScheduleConfig, peak: float, before: int, now: int, step: int
) -> tuple[str | None, str | None]:
    """What it means to go on after `step` with another length of the run: (why not, None), or (None, what to say).

    A constant rate does not depend on the length. One that is flat until its tail goes on too; one that falls all the
    way had other rates in the steps that were made.
    """
    if now < step:
        return f"the run has made {step} steps already", None
    if config.kind == "constant":
        return None, None
    then, next_rate = (peak * learning_rate_ratio(step, total, config) for total in (before, now))
    if config.kind == "warmup-stable-decay":
        tail = max(config.warmup_steps, now - decay_length(now, config))
        told = f"run.steps: {before} before, {now} now; the rate falls from step {tail} on"
        if step > (begun := max(config.warmup_steps, before - decay_length(before, config))):
            told += (
                f". It had begun to fall at step {begun}: it was to be {then:.3g} here and is {next_rate:.3g}; go on "
                f"from a checkpoint of step {begun} or before to have it never fall in between"
            )
        return None, told
    return (
        f"with schedule.kind {config.kind} the rate follows the length of the run. Here it was to be {then:.3g} and "
        f"would jump to {next_rate:.3g}, and the {step} steps made so far would have had other rates. Leave run.steps "
        "as it is, or train the weights on in a new run; with constant and warmup-stable-decay a run may grow"
    ), None
