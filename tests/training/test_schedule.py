"""The schedules: the reference's numbers, and the shapes' landmarks."""

from __future__ import annotations

import json
import math

import pytest
from safetensors import safe_open

from megalodon.training.schedule import ScheduleConfig, learning_rate_ratio, schedule_problems


def ratios(total, **fields):
    config = ScheduleConfig(**fields)
    return [learning_rate_ratio(step, total, config) for step in range(total + 3)]


def test_cosine_equals_the_reference(shared):
    with safe_open(shared / "golden" / "train_cosine.safetensors", "pt") as golden:
        meta = json.loads(golden.metadata()["meta"])
        expected = golden.get_tensor("lrs").tolist()
    optim = meta["optim"]
    config = ScheduleConfig(
        kind=optim["scheduler"],
        warmup_steps=optim["warmup"],
        init_ratio=optim["lr_init_ratio"],
        end_ratio=optim["lr_end_ratio"],
        cycles=optim["cycles"],
    )
    got = [optim["lr"] * learning_rate_ratio(step, meta["steps"], config) for step in range(meta["steps"])]
    assert got == pytest.approx(expected, rel=1e-12)


def test_warmup_is_linear_from_init_ratio():
    got = ratios(100, kind="constant", warmup_steps=10, init_ratio=0.1)
    assert got[0] == pytest.approx(0.1)
    assert got[5] == pytest.approx(0.55)
    assert got[10] == got[50] == got[102] == 1.0


def test_linear_falls_to_end_ratio():
    got = ratios(100, kind="linear", end_ratio=0.2)
    assert got[0] == 1.0
    assert got[50] == pytest.approx(0.6)
    assert got[100] == pytest.approx(0.2)
    assert got[102] == pytest.approx(0.2)


def test_cosine_cycles_count_half_periods():
    got = ratios(100, kind="cosine", end_ratio=0.0, cycles=2.0)
    assert got[50] == pytest.approx(0.0, abs=1e-12)
    assert got[100] == pytest.approx(1.0)
    assert got[101] == 0.0
    once = ratios(100, kind="cosine", end_ratio=0.0)
    assert once[25] == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_warmup_stable_decay_has_three_parts():
    got = ratios(100, kind="warmup-stable-decay", warmup_steps=10, decay_steps=20, end_ratio=0.0)
    assert got[9] < 1.0
    assert all(ratio == 1.0 for ratio in got[10:81])
    assert got[90] == pytest.approx(0.5)
    assert got[100] == got[102] == 0.0
    a_tenth = ratios(100, kind="warmup-stable-decay", end_ratio=0.0)
    assert a_tenth[90] == 1.0 > a_tenth[91]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"warmup_steps": 100}, "schedule.warmup_steps"),
        ({"decay_steps": 5}, "schedule.decay_steps"),
        ({"kind": "warmup-stable-decay", "warmup_steps": 60, "decay_steps": 50}, "schedule.decay_steps"),
        ({"kind": "linear", "cycles": 2.0}, "schedule.cycles"),
    ],
)
def test_contradictions_are_named(fields, name):
    (problem,) = schedule_problems(ScheduleConfig(**fields), 100)
    assert problem.startswith(name)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        learning_rate_ratio(-1, 10, ScheduleConfig())
