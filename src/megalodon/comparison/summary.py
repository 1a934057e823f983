"""From records to what a reader wants to know: means over seeds and their spread, by architecture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalodon.comparison.plan import Job, Plan, Records
from megalodon.training.metrics import read_lines


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, sample standard deviation (None for one seed), and how many there are."""

    mean: float
    deviation: float | None
    count: int

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread | None:
        """Of the values that there are; None where there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


Points = list[tuple[float, Spread]]
"""A curve: (x, the number there over seeds)."""


@dataclass
class Runs:
    """An architecture's runs at equal tokens, or at equal time.

    Attributes:
        steps: of each; finished, diverged: how many runs; held_out, test: at the end, in the report's unit; documents:
        test texts by name. by_tokens, by_seconds: the held-out loss as training goes on, seconds being steps times the
        architecture's seconds a step. by_distance: loss by the tokens since everything was forgotten, (first, end) and
        the number; by_place: by the place in the chunk; by_position: by that in the text, read as `cut` says.
    """

    steps: int
    finished: int = 0
    diverged: int = 0
    held_out: Spread | None = None
    test: Spread | None = None
    documents: dict[str, Spread] = field(default_factory=dict)
    by_tokens: Points = field(default_factory=list)
    by_seconds: Points = field(default_factory=list)
    by_distance: list[tuple[int, int, Spread]] = field(default_factory=list)
    by_place: list[tuple[int, int, Spread]] = field(default_factory=list)
    by_position: list[tuple[int, int, Spread]] = field(default_factory=list)


@dataclass
class Architecture:
    """All that is known of one. `sweep`: (rate, held-out number; None: diverged) of what was tried, ascending.
    `recall`: task -> accuracy, of the width and the rate at which it is highest."""

    name: str
    parameters: int
    sizes: dict[str, int]
    mode: str
    cut: int | None
    sweep: list[tuple[float, float | None]]
    rate: float | None
    speed: dict[str, Any] | None
    tokens: Runs
    time: Runs | None
    recall: dict[str, float]


@dataclass
class Summary:
    """A comparison as far as it is finished. `unit` is what the numbers are in; `key` is its name in records."""

    unit: str
    key: str
    architectures: list[Architecture]
    seconds: float | None
    texts: dict[str, Any] | None
    finished: int
    wanted: int


def summarize(plan: Plan, records: Records) -> Summary:
    """What the records say of a plan."""
    trained = [record for record in records.values() if record["kind"] == "train"]
    in_bytes = all(record["held_out"]["bits_per_byte"] is not None for record in trained if not record["diverged"])
    key, unit = ("bits_per_byte", "bits a byte") if in_bytes else ("loss", "nats a token")
    timed = plan.equal_time(records)
    recall = {task: _recall(Path(path).expanduser()) for task, path in plan.config.recall.items()}
    found = []
    for name in plan.names:
        choice = plan.choice(name, records)
        sweep = []
        for rate in choice.rates:
            record = records.get(plan.train(name, rate, plan.config.seeds[0], plan.sweep_steps).key)
            if record is not None:
                sweep.append((rate, None if record["diverged"] else record["held_out"][key]))
        runs = plan.runs(name, records)
        matched, speed = plan.matched[name], records.get(plan.speed(name).key)
        mode = plan.train(name, choice.rates[0], plan.config.seeds[0], plan.sweep_steps).detail["config"]["data"][
            "mode"
        ]
        found.append(
            Architecture(
                name=name,
                parameters=matched.parameters,
                sizes=matched.sizes,
                mode=mode,
                cut=plan.cuts[name],
                sweep=sweep,
                rate=choice.best,
                speed=speed,
                tokens=_runs(plan, records, runs["tokens"], plan.steps, key, speed),
                time=None if timed is None else _runs(plan, records, runs["time"], timed[1][name], key, speed),
                recall={task: best[name] for task, best in recall.items() if name in best},
            )
        )
    wanted = plan.wanted(records)
    return Summary(
        unit=unit,
        key=key,
        architectures=found,
        seconds=None if timed is None else timed[0],
        texts=None if plan.texts is None else records.get(plan.texts.key),
        finished=sum(job.key in records for job in wanted),
        wanted=len(wanted),
    )


def _recall(path: Path) -> dict[str, float]:
    """The best accuracy of each model of a recall study, the mean over the seeds of one width and one rate."""
    groups: dict[tuple[str, int, float], list[float]] = {}
    for result in read_lines(path) if path.is_file() else []:
        if not result["diverged"]:
            key = (result["model"], result["width"], result["learning_rate"])
            groups.setdefault(key, []).append(result["mean_accuracy"])
    best: dict[str, float] = {}
    for (model, _, _), accuracies in groups.items():
        best[model] = max(best.get(model, 0.0), statistics.fmean(accuracies))
    return best


def _runs(
    plan: Plan, records: Records, jobs: Sequence[Job], steps: int, key: str, speed: dict[str, Any] | None
) -> Runs:
    trained = [records[job.key] for job in jobs if job.key in records]
    whole = [record for record in trained if not record["diverged"]]
    scores = [records[plan.score(job).key] for job in jobs if plan.score(job).key in records]
    runs = Runs(steps, len(whole), len(trained) - len(whole))
    runs.held_out = Spread.of(record["held_out"][key] for record in whole)
    runs.test = Spread.of(score["whole"]["overall"][key] for score in scores)
    for number, document in enumerate(scores[0]["whole"]["documents"] if scores else []):
        spread = Spread.of(score["whole"]["documents"][number][key] for score in scores)
        if spread is not None:
            runs.documents[document["name"]] = spread
    curve_key = f"heldout_{key}"
    for points in zip(*(record["curve"] for record in whole), strict=False):
        spread = Spread.of(point[curve_key] for point in points)
        if spread is not None and points[0]["step"] > 0:
            runs.by_tokens.append((points[0]["step"] * plan.step_tokens, spread))
            if speed is not None:
                runs.by_seconds.append((points[0]["step"] * speed["training"]["seconds_a_step"], spread))
    runs.by_distance = _ranges([score["context"]["by_distance"] for score in scores], key)
    runs.by_position = _ranges([score["whole"]["by_position"] for score in scores], key)
    runs.by_place = _ranges([score["whole"]["by_chunk_place"] or [] for score in scores], key)
    return runs


def _ranges(reports: list[list[dict[str, Any]]], key: str) -> list[tuple[int, int, Spread]]:
    found = []
    for ranges in zip(*reports, strict=False):
        spread = Spread.of(one[key] for one in ranges)
        if spread is not None:
            found.append((ranges[0]["from"], ranges[0]["to"], spread))
    return found
