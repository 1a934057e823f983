"""What a comparison consists of: jobs, each known by what it computes, and which of them are to be done next.

A job's key holds a hash of all that its result depends on. So a comparison that is started again does what is missing,
a changed config makes new jobs, and two places of the plan that need the same run share it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from megalodon.comparison.config import CompareConfig, train_config_of
from megalodon.comparison.matching import match_parameters
from megalodon.comparison.sweep import Choice, choose_rate
from megalodon.data import load_tokenizer
from megalodon.training.config import TrainConfig
from megalodon.training.model_section import resolve_model

Kind = Literal["texts", "speed", "train", "score"]
Records = Mapping[str, dict[str, Any]]
"""Results by key."""


@dataclass(frozen=True)
class Job:
    """Something to compute: `detail` is all that its result depends on, in plain values; `about` names it to people.

    `key` names its folder and its record. `alone`: it is measured while nothing else of the comparison runs.
    """

    kind: Kind
    key: str
    detail: dict[str, Any]
    about: dict[str, Any]
    alone: bool = False

    def __str__(self) -> str:
        words = [str(self.about.get("architecture", "the test texts"))]
        if "learning_rate" in self.about:
            words += [f"rate {self.about['learning_rate']:g}", f"seed {self.about['seed']}"]
        return f"{self.kind} {', '.join(words)}"


def _job(kind: Kind, name: str, detail: dict[str, Any], about: dict[str, Any], alone: bool = False) -> Job:
    digest = hashlib.sha256(json.dumps([kind, detail], sort_keys=True).encode()).hexdigest()[:10]
    return Job(kind, f"{kind}-{name}-{digest}", detail, about, alone)


class Plan:
    """The jobs of a comparison.

    Attributes:
        matched: each architecture's model section with its sizes found, and its parameters.
        steps: of a run at equal tokens. sweep_steps: of a run of the sweep.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.matched = match_parameters(config)
        first = train_config_of(config, self.names[0])
        self.steps = first.run.steps
        self.sweep_steps = config.sweep.steps or self.steps
        self.step_tokens = first.data.batch_size * first.data.sequence_length
        self.train, self.speed = cache(self._train), cache(self._speed)
        self._scores: dict[str, Job] = {}

    @property
    def names(self) -> list[str]:
        """Of the architectures, in order."""
        return list(self.config.architectures)

    # --- jobs ---------------------------------------------------------------------------------------------------

    def _train(self, name: str, rate: float, seed: int, steps: int) -> Job:
        """A training run."""
        config = train_config_of(
            self.config, name, model=self.matched[name].model, learning_rate=rate, seed=seed, steps=steps
        )
        about = {"architecture": name, "learning_rate": rate, "seed": seed, "steps": steps}
        detail = {"config": _result_settings(config), "threads": self.config.threads}
        return _job("train", f"{name}-{rate:g}-seed{seed}-{steps}", detail, about)

    def score(self, train: Job) -> Job:
        """The scores of a run's model on the test texts."""
        if train.key not in self._scores:
            self._scores[train.key] = self._score(train)
        return self._scores[train.key]

    def _score(self, train: Job) -> Job:
        name = train.about["architecture"]
        test = self.config.test.model_dump(mode="json")
        detail = {"of": train.key, "test": test, "cut": self.cuts[name]}
        return _job("score", train.key.split("-", 1)[1].rsplit("-", 1)[0], detail, train.about)

    def _speed(self, name: str) -> Job:
        """Memory and speed of an architecture."""
        config = train_config_of(self.config, name, model=self.matched[name].model, steps=self.steps)
        detail = {
            "config": _result_settings(config),
            "speed": self.config.speed.model_dump(mode="json"),
            "threads": self.config.threads,
        }
        return _job("speed", name, detail, {"architecture": name}, alone=True)

    @cached_property
    def texts(self) -> Job | None:
        """What general compressors make of the test texts."""
        if self.config.test.corpus is None:
            return None
        tokenizer = self.config.train.get("tokenizer") or "bytes"
        limit = self.config.test.max_tokens if tokenizer == "bytes" else None
        detail = {"corpus": self.config.test.corpus.model_dump(mode="json"), "max_bytes": limit}
        return _job("texts", "compressed", detail, {})

    @cached_property
    def cuts(self) -> dict[str, int | None]:
        """After how many tokens each architecture forgets everything while whole texts are scored; None: never."""
        tokenizer = load_tokenizer(self.config.train.get("tokenizer") or "bytes")
        found = {}
        for name, entry in self.config.architectures.items():
            config = train_config_of(self.config, name, model=self.matched[name].model)
            carried = config.data.mode == "streamed"
            if resolve_model(config.model, tokenizer).streaming_problem() is not None:
                carried = False
            found[name] = entry.cut or (None if carried else config.data.sequence_length)
        return found

    # --- what is known ------------------------------------------------------------------------------------------

    def choice(self, name: str, records: Records) -> Choice:
        """Where the sweep of an architecture stands."""
        sweep = self.config.sweep

        def loss(rate: float) -> float | None:
            record = records.get(self.train(name, rate, self.config.seeds[0], self.sweep_steps).key)
            return None if record is None else math.inf if record["diverged"] else record["held_out"]["loss"]

        return choose_rate(sweep.learning_rates, sweep.widen, loss, name)

    def seconds_a_step(self, name: str, records: Records) -> float | None:
        """Of a training step of an architecture on this machine, when nothing else ran; None: not measured yet."""
        record = records.get(self.speed(name).key)
        return None if record is None else record["training"]["seconds_a_step"]

    def equal_time(self, records: Records) -> tuple[float, dict[str, int]] | None:
        """(the time in seconds, the steps of each architecture that fit into it); None: not known yet, or not asked."""
        if self.config.equal_time is None:
            return None
        seconds = {name: self.seconds_a_step(name, records) for name in self.names}
        known = {name: value for name, value in seconds.items() if value is not None}
        if len(known) < len(seconds):
            return None
        budget = self.config.equal_time.seconds or min(known.values()) * self.steps
        return budget, {name: max(1, math.floor(budget / value + 1e-6)) for name, value in known.items()}

    def runs(self, name: str, records: Records) -> dict[str, list[Job]]:
        """An architecture's runs of all seeds with its own learning rate: at equal `tokens` and at equal `time`; none
        before the rate is chosen."""
        best = self.choice(name, records).best
        if best is None:
            return {"tokens": [], "time": []}
        timed = self.equal_time(records)
        return {
            "tokens": [self.train(name, best, seed, self.steps) for seed in self.config.seeds],
            "time": [] if timed is None else [self.train(name, best, s, timed[1][name]) for s in self.config.seeds],
        }

    # --- what is to be done -------------------------------------------------------------------------------------

    def wanted(self, records: Records) -> list[Job]:
        """All jobs that are known to be needed, done or not, in the order in which they are best done."""
        jobs = [self.texts] if self.texts is not None else []
        jobs += [self.speed(name) for name in self.names]
        for rate in range(max(len(self.choice(name, records).rates) for name in self.names)):
            for name in self.names:
                rates = self.choice(name, records).rates
                if rate < len(rates):
                    jobs.append(self.train(name, rates[rate], self.config.seeds[0], self.sweep_steps))
        for purpose in ("tokens", "time"):
            for number in range(len(self.config.seeds)):
                for name in self.names:
                    runs = self.runs(name, records)[purpose]
                    if number < len(runs):
                        jobs.append(runs[number])
                        if self.config.test.corpus is not None and not self._diverged(runs[number], records):
                            jobs.append(self.score(runs[number]))
        return list({job.key: job for job in jobs}.values())

    @staticmethod
    def _diverged(train: Job, records: Records) -> bool:
        return train.key in records and records[train.key]["diverged"]

    def ready(self, records: Records) -> list[Job]:
        """Jobs without a record whose own needs are met."""
        return [
            job
            for job in self.wanted(records)
            if job.key not in records and (job.kind != "score" or job.detail["of"] in records)
        ]

    def training_left(self, records: Records) -> dict[str, int]:
        """Steps that each architecture is still to be trained for, as far as can be told now."""
        timed = self.equal_time(records)
        left = {}
        for name in self.names:
            seeds = len(self.config.seeds)
            choice = self.choice(name, records)
            done = [
                self.train(name, rate, self.config.seeds[0], self.sweep_steps).key in records for rate in choice.rates
            ]
            steps = (len(done) - sum(done)) * self.sweep_steps
            runs = self.runs(name, records)
            for purpose, each in (("tokens", self.steps), ("time", 0 if timed is None else timed[1][name])):
                finished = sum(job.key in records for job in runs[purpose])
                steps += (seeds - finished) * each
            left[name] = steps
        return left


def _result_settings(config: TrainConfig) -> dict[str, Any]:
    """A training config in plain values, without its folder; of the model, what is given, for the rest follows from it
    and the tokenizer."""
    values = config.model_dump(mode="json")
    values["model"] = {"architecture": config.model.architecture, **config.model.model_dump(exclude_unset=True)}
    del values["run"]["folder"]
    return values
