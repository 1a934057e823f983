"""A whole comparison, tiny: stopped and resumed it says the same, and its report says what the models say."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megalodon.cli import main
from megalodon.comparison import JobError, Plan, compare, load_comparison, read_results, runner, worker, write_report
from megalodon.comparison.results import ResultsFile
from megalodon.data import ByteTokenizer, Corpus
from megalodon.evaluation import evaluate_perplexity
from megalodon.inference import load_model
from megalodon.training import launch

Write = Callable[[dict[str, Any]], Path]


class InThisProcess:
    """Stands for a job's process: the job is done at once, here. Starting one takes seconds, and there are many."""

    started: list[str]
    fail: str | None = None

    def __init__(self, folder: Path, threads: int) -> None:
        self.started.append(folder.name)
        if self.fail is not None and self.fail in folder.name:
            (folder / "log.txt").write_text("the disk is on fire\n")
            self.returncode = 1
        else:
            self.returncode = worker.main(folder)

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self, timeout: float) -> int:
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> type[InThisProcess]:
    kind = type("InThisProcess", (InThisProcess,), {"started": []})
    monkeypatch.setattr(runner, "start_process", kind)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)  # a third of a second each time
    return kind


def test_a_whole_comparison(
    tiny: dict[str, Any], write_config: Write, in_this_process: type[InThisProcess], tmp_path: Path
) -> None:
    config = load_comparison(write_config(tiny))
    said: list[str] = []

    # A job that fails stops the comparison, says why, and loses nothing.
    in_this_process.fail = "0.03-"
    with pytest.raises(JobError, match=r"(?s)rate 0\.03, seed 0 ended with status 1.*the disk is on fire"):
        compare(config, said.append)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert before.count(b"\n") >= 3

    # A kill in the middle of a line, and one between a record and its line.
    lines = before.splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    done = set(in_this_process.started)
    in_this_process.fail, in_this_process.started[:] = None, []
    assert not compare(config, said.append)
    assert not {key for key in in_this_process.started if key in done and "0.03-" not in key}
    records = read_results(tmp_path / "out" / "results.jsonl")
    assert {json.loads(line)["key"] for line in lines} <= set(records)

    # Again: nothing is left to do. Another seed: only its runs.
    assert Plan(config).ready(records) == []
    more = load_comparison(write_config(tiny | {"seeds": [0, 1, 2]}))
    assert all("seed2" in job.key for job in Plan(more).ready(records))

    _check_numbers(Plan(config), records, tmp_path)
    _check_report(Plan(config), records, tmp_path / "out")


def _check_numbers(plan: Plan, records: dict[str, Any], folder: Path) -> None:
    for name in plan.names:
        choice = plan.choice(name, records)
        losses = [records[plan.train(name, rate, 0, 4).key]["held_out"]["loss"] for rate in choice.rates]
        assert choice.best == choice.rates[losses.index(min(losses))]
        assert 0 < choice.rates.index(choice.best) < len(choice.rates) - 1
        for job in plan.runs(name, records)["tokens"]:
            assert records[job.key]["parameters"] == plan.matched[name].parameters
            assert records[job.key]["tokens"] == 8 * 4 * 24
            assert [point["step"] for point in records[job.key]["curve"]] == [0, 4, 8]
    budget, steps = plan.equal_time(records)  # type: ignore[misc]
    assert max(steps.values()) == 8
    for name, count in steps.items():
        seconds = records[plan.speed(name).key]["training"]["seconds_a_step"]
        assert (count - 1) * seconds < budget + 1e-6 and (count * seconds <= budget + 1e-4 or count == 1)

    # The score of a run is what the library says of its model, read anew.
    job = plan.runs("llama", records)["tokens"][1]
    model = load_model(folder / "out" / "jobs" / job.key / "run" / "model")
    documents = list(Corpus({"source": str(folder / "test")}).documents())
    found = evaluate_perplexity(model, ByteTokenizer(), documents, max_tokens=400, reset_every=24)
    score = records[plan.score(job).key]
    assert score["whole"]["overall"]["loss"] == pytest.approx(found["overall"]["loss"], rel=1e-6)
    assert plan.cuts == {"megalodon": None, "llama": 24}


def _check_report(plan: Plan, records: dict[str, Any], folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    markdown, html = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    for entry in summary["architectures"]:
        jobs = plan.runs(entry["name"], records)["tokens"]
        scores = [records[plan.score(job).key]["whole"]["overall"]["bits_per_byte"] for job in jobs]
        assert len(scores) == entry["tokens"]["test"]["count"] == 2
        assert entry["tokens"]["test"]["mean"] == pytest.approx(statistics.fmean(scores))
        assert entry["tokens"]["test"]["deviation"] == pytest.approx(statistics.stdev(scores))
        shown = f"{statistics.fmean(scores):.3f} ± {statistics.stdev(scores):.3f}"
        assert shown in markdown and shown in html
        first, end, spread = entry["tokens"]["by_distance"][-1]
        expected = [records[plan.score(job).key]["context"]["by_distance"][-1]["bits_per_byte"] for job in jobs]
        assert (first, end) == (32, 64) and spread["mean"] == pytest.approx(statistics.fmean(expected))
        rate = plan.choice(entry["name"], records).best
        assert rate == entry["rate"] and f"**{dict(entry['sweep'])[rate]:.4f}**" in markdown
    data = b"".join(path.read_bytes()[:400] for path in sorted((folder.parent / "test").iterdir()))
    gzip = next(iter(summary["texts"]["documents"]))["compressed"]["gzip -9"]
    assert gzip < 400 and len(data) == 800 and "gzip -9" in html and "xz -9" in markdown

    page = _Page()
    page.feed(html)
    assert page.counts["svg"] >= 7 and page.counts["table"] >= 5
    assert page.outside == []
    assert (folder / "compare.yaml").exists() and "sequence_length: 24" in markdown


class _Page(HTMLParser):
    """Counts elements, and lists whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag in ("script", "link", "img", "iframe"):
            self.outside.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.outside.append(value)


def test_a_test_text_that_is_trained_on_is_refused(
    tiny: dict[str, Any], write_config: Write, in_this_process: type[InThisProcess], tmp_path: Path
) -> None:
    for folder in ("train", "valid"):
        copied = tmp_path / "test" / "copy.txt"
        copied.write_bytes(next((tmp_path / folder).iterdir()).read_bytes())
        with pytest.raises(ValueError, match=r"test\.corpus, beside the .* text: 1 of its 3 documents"):
            compare(load_comparison(write_config(tiny)), lambda text: None)
        copied.unlink()
    assert in_this_process.started == []


def test_a_report_of_nothing_and_of_a_diverged_run(tiny: dict[str, Any], write_config: Write, tmp_path: Path) -> None:
    plan = Plan(load_comparison(write_config(tiny)))
    assert "Not finished" in _written(plan, {}, tmp_path)
    job = plan.train("llama", 0.003, 0, 4)
    record = {"key": job.key, "kind": "train", **job.about, "diverged": True, "made_with": worker.made_with()}
    record |= {"held_out": {"loss": None, "bits_per_byte": None}, "curve": []}
    assert "diverged" in _written(plan, {job.key: record}, tmp_path)


def test_recall_stands_beside(tiny: dict[str, Any], write_config: Write, tmp_path: Path) -> None:
    study = tmp_path / "recall.jsonl"
    runs = [("llama", 32, 1e-3, 0.5), ("llama", 32, 1e-3, 0.7), ("llama", 64, 1e-3, 0.2), ("mamba", 64, 1e-3, 1.0)]
    keys = ("model", "width", "learning_rate", "mean_accuracy")
    results = [{**dict(zip(keys, run, strict=True)), "diverged": False} for run in runs]
    study.write_text("".join(json.dumps(result) + "\n" for result in results))
    text = _written(Plan(load_comparison(write_config(tiny | {"recall": {"MQAR": str(study)}}))), {}, tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| llama"))
    assert "MQAR" in text and "60.0%" in row and "100.0%" not in text


def _written(plan: Plan, records: dict[str, Any], folder: Path) -> str:
    write_report(plan, records, folder)
    return (folder / "report.md").read_text()


def test_records_survive_any_cut(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    file = ResultsFile(path)
    for number in range(3):
        file.add({"key": str(number), "value": number / 3})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = ResultsFile(path).records
        assert list(kept) == [str(n) for n in range(whole[:cut].count(b"\n"))]
        ResultsFile(path).add({"key": "new"})
        assert list(read_results(path)) == [*kept, "new"]
    with pytest.raises(ValueError, match="JSON compliant"):
        file.add({"key": "x", "value": math.nan})


def test_the_command(tiny: dict[str, Any], write_config: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tiny)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as exit:
            main(["compare", str(path), *arguments])
        return int(exit.value.code or 0)

    assert run("--dry-run", "train.run.steps=16") == 0
    printed = capsys.readouterr().out
    assert "16 steps of 96 tokens" in printed and "rate 0.01, seed 0, 4 steps" in printed
    assert run("--report-only") == 2
    assert "no results yet" in capsys.readouterr().err
    assert run("sweep.stepps=3") == 2
    assert "sweep.stepps: unknown key" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_the_same(tiny: dict[str, Any], write_config: Write, tmp_path: Path) -> None:
    tiny |= {"seeds": [0], "equal_time": None}
    tiny["train"] |= {"run": {"steps": 40}, "checkpoint": {"every": 2}}
    path = write_config(tiny)

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megalodon", "compare", str(path), f"folder={folder}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(600) == 0
    for number in range(200):
        process = start(killed)
        try:
            assert process.wait(5 + 3 * number) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
            process.wait(130)
            time.sleep(0.5)
    else:
        pytest.fail("it never came to its end")
    results = [read_results(folder / "results.jsonl") for folder in (whole, killed)]
    assert results[0].keys() == results[1].keys()
    for key, record in results[0].items():
        if record["kind"] == "train":
            assert record["held_out"] == results[1][key]["held_out"]
            assert [point["heldout_loss"] for point in record["curve"]] == [
                point["heldout_loss"] for point in results[1][key]["curve"]
            ]
        if record["kind"] == "score":
            assert record["whole"] == results[1][key]["whole"]
