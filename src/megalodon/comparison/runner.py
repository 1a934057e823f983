"""Doing a comparison: jobs in processes side by side, their records gathered, the report kept up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from megalodon.comparison.config import CompareConfig, train_config_of
from megalodon.comparison.plan import Job, Plan
from megalodon.comparison.progress import Outlook, Progress
from megalodon.comparison.report import write_report
from megalodon.comparison.results import ResultsFile
from megalodon.data import Corpus, DocumentSet, cache_root, load_tokenizer, tokenize, without_shared
from megalodon.files import write_text
from megalodon.inference import choose_device
from megalodon.training.corpora import prepare
from megalodon.training.interrupt import StopRequest
from megalodon.training.progress import LineDisplay

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_REPORTS = 60.0
SECONDS_TO_SAVE = 120.0
LOG_LINES = 15


class JobError(RuntimeError):
    """A job ended without a result. Says which, and the end of what it printed."""


@dataclass
class Running:
    """A job's process."""

    job: Job
    folder: Path
    process: subprocess.Popen[bytes]


def compare(config: CompareConfig, say: Callable[[str], None] = print) -> StopRequest:
    """Do all of a comparison that has no record yet, and write its report.

    Returns:
        The request that stopped it; false if it was finished.

    Raises:
        ValueError: before any work: sizes that cannot be matched, texts that are both tested and trained on, another
            process at work in the folder; or a sweep that finds no rate inside.
        JobError: a job failed; the others were stopped and go on when the command is given again.
    """
    plan = Plan(config)
    folder = Path(config.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"folder: another process is at work in {folder}; wait for it or stop it") from None
    try:
        check_texts(config, say)
        write_text(folder / "compare.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        results = ResultsFile(folder / "results.jsonl")
        for line in introduction(plan):
            say(line)
        with StopRequest() as stop:
            _Work(plan, folder, results, say).run(stop)
        write_report(plan, results.records, folder)
        return stop
    finally:
        lock.release()


def introduction(plan: Plan) -> list[str]:
    """What the comparison consists of, for people."""
    lines = [
        f"{name}: {each.parameters:,} parameters with {', '.join(f'{k} {v}' for k, v in each.sizes.items())}"
        for name, each in plan.matched.items()
    ]
    tokens = plan.steps * plan.step_tokens
    return [*lines, f"{plan.steps:,} steps of {plan.step_tokens:,} tokens, {tokens:,} in all, each seed"]


def check_texts(config: CompareConfig, say: Callable[[str], None]) -> None:
    """Tokenise the texts, and refuse a test text that is also trained on or chosen by.

    Raises:
        ValueError: naming it.
    """
    if config.test.corpus is None:
        return
    first = train_config_of(config, next(iter(config.architectures)))
    tokenizer = load_tokenizer(first.tokenizer or "bytes")
    texts = prepare(first, tokenizer, LineDisplay(0))
    cache, memory = first.data.cache_folder, cache_root(first.data.cache_folder) / "shared"
    tests = DocumentSet.of(tokenize(Corpus(config.test.corpus), tokenizer, cache, None))
    others = {"training": texts.training.sets, "held-out": list(texts.held_out.values())}
    for name, sets in others.items():
        for documents in sets:
            without_shared(documents, tests, tokenizer, "refuse", memory, say, f"test.corpus, beside the {name} text")
    say(f"test: {len(tests)} documents with {tests.num_tokens:,} tokens, in neither the training nor the held-out text")


def processes_at_once(config: CompareConfig) -> int:
    """How many jobs run side by side: as given, or as many as the processors have threads for; one on a GPU."""
    if config.processes is not None:
        return config.processes
    if choose_device(None).type != "cpu":
        return 1
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // config.threads)


def start_process(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """A process that does the job in a folder; it stops by itself when this one ends."""
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megalodon.comparison.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            start_new_session=True,  # so that a signal of the terminal comes to it through us, once
        )


class _Work:
    def __init__(self, plan: Plan, folder: Path, results: ResultsFile, say: Callable[[str], None]) -> None:
        self.plan, self.folder, self.results, self.say = plan, folder, results, say
        self.at_once = processes_at_once(plan.config)
        self.running: list[Running] = []
        self._reported = time.monotonic()

    def run(self, stop: StopRequest) -> None:
        """Until nothing is left, or `stop`."""
        with Progress(self.say) as progress:
            try:
                while not stop:
                    self._gather()
                    if not self._start() and not self.running:
                        return
                    progress.show(Outlook.of(self.plan, self.results.records, self.running, self.at_once))
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                self._end()

    def _start(self) -> bool:
        """Start what there is room for. Whether anything is left to be started, now or later."""
        busy = {each.job.key for each in self.running}
        waiting = [job for job in self.plan.ready(self.results.records) if job.key not in busy]
        for job in waiting:
            if self._take_over(job):
                return True
            if len(self.running) >= self.at_once or any(each.job.alone for each in self.running):
                break
            if job.alone and self.running:
                break  # when the others are done
            self._launch(job)
        return bool(waiting)

    def _launch(self, job: Job) -> None:
        folder = self.folder / "jobs" / job.key
        folder.mkdir(parents=True, exist_ok=True)
        plain = {"kind": job.kind, "key": job.key, "detail": job.detail, "about": job.about}
        write_text(folder / "job.json", json.dumps(plain))
        process = start_process(folder, self.plan.config.threads)
        self.running.append(Running(job, folder, process))

    def _take_over(self, job: Job) -> bool:
        """Take in the record of a job that an earlier start finished and did not write down."""
        record = self.folder / "jobs" / job.key / "record.json"
        if not record.exists():
            return False
        self._add(json.loads(record.read_text(encoding="utf-8")))
        return True

    def _gather(self) -> None:
        for each in [each for each in self.running if each.process.poll() is not None]:
            self.running.remove(each)
            if not self._take_over(each.job):
                log = (each.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
                tail = "\n  ".join(log[-LOG_LINES:])
                raise JobError(f"{each.job} ended with status {each.process.returncode}:\n  {tail}")

    def _add(self, record: dict[str, Any]) -> None:
        self.results.add(record)
        self.say(f"done: {told(record)}")
        if time.monotonic() - self._reported >= SECONDS_BETWEEN_REPORTS:
            write_report(self.plan, self.results.records, self.folder)
            self._reported = time.monotonic()

    def _end(self) -> None:
        """Have what runs save and stop."""
        for each in self.running:
            each.process.terminate()
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for each in self.running:
            try:
                each.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()


def told(record: dict[str, Any]) -> str:
    """One line about a record."""
    name = record.get("architecture", "compressors")
    if record["kind"] == "texts":
        return ", ".join(f"{method} {bits:.3f} bits a byte" for method, bits in record["bits_per_byte"].items())
    if record["kind"] == "speed":
        training = record["training"]
        return f"speed of {name}: {training['tokens_a_second']:,.0f} tokens a second in training"
    run = f"{name}, rate {record['learning_rate']:g}, seed {record['seed']}, {record['steps']:,} steps"
    if record["kind"] == "score":
        overall = record["whole"]["overall"]
        return f"scored {run}: {_bits(overall)} on the test texts"
    return f"{run}: " + ("diverged" if record["diverged"] else f"{_bits(record['held_out'])} held out")


def _bits(scores: dict[str, Any]) -> str:
    bits = scores.get("bits_per_byte")
    return f"{scores['loss']:.4f} nats a token" if bits is None else f"{bits:.4f} bits a byte"
