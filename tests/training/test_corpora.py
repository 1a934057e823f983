"""The texts of a run: mixtures, resuming by content, runs that grow, and what is noticed before a step is made."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_resume import assert_same, elsewhere, train

from megalodon.data import Corpus, load_tokenizer
from megalodon.data.bpe import train_bpe
from megalodon.evaluation import evaluate_perplexity
from megalodon.inference import load_model
from megalodon.inference.loading import load_tokenizer_for
from megalodon.training import DivergedError, heldout, launch
from megalodon.training.checkpoint import CheckpointError
from megalodon.training.config_file import check_config
from megalodon.training.heldout import HeldOutLoss
from megalodon.training.metrics import JsonLines, read_lines
from megalodon.training.schedule import ScheduleConfig, learning_rate_ratio, length_change

WORDS = ["sea", "whale", "stone", "memory", "below", "water", "swam", "of", "the", "and"]


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count)) + "\n"


@pytest.fixture
def mixed(tiny, tmp_path) -> dict:
    for number, name in enumerate(("books", "code")):
        (tmp_path / name).mkdir()
        for seed in range(3):
            (tmp_path / name / f"{seed}.txt").write_text(words(10 * number + seed, 150 + 50 * seed))
    tiny["data"] = {key: tiny["data"][key] for key in ("sequence_length", "batch_size", "cache_folder")}
    tiny["data"]["mixture"] = {
        "books": {"corpus": {"source": str(tmp_path / "books")}, "weight": 3, "held_out": {"documents": 1}},
        "code": {"corpus": {"source": str(tmp_path / "code")}, "held_out": {"documents": 1}},
    }
    return tiny


def test_a_mixture_has_a_loss_an_epoch_and_documents_of_each_source(mixed, tmp_path):
    train(mixed)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    measured = [record for record in records if "heldout_loss" in record]
    assert [record["step"] for record in measured] == [0, 4, 8, 12]
    for record in measured:
        parts = [record[f"heldout_loss/{name}"] for name in ("books", "code")]
        assert record["heldout_loss"] == pytest.approx((3 * parts[0] + parts[1]) / 4)
        assert {"heldout_bits_per_byte", "heldout_bits_per_byte/code"} <= record.keys()
    steps = records[1:]
    assert [record["tokens"] for record in steps] == [96 * step for step in range(1, 13)]
    assert steps[-1]["epoch/books"] / steps[-1]["epoch/code"] == pytest.approx(3, rel=0.35)
    assert all(a["epoch"] < b["epoch"] and a["documents"] <= b["documents"] for a, b in pairwise(steps))
    assert 1 <= steps[-1]["documents"] <= 4 + 12
    changed = json.loads(json.dumps(mixed))
    changed["data"]["mixture"]["books"]["weight"] = 2
    with pytest.raises(CheckpointError, match=r"data\.mixture\.books\.weight: 3\.0 before, 2\.0 now"):
        train(changed)


def test_a_mixture_resumes_bit_for_bit_also_from_another_place(mixed, tmp_path):
    train(elsewhere(mixed, tmp_path, "whole"))
    shorter = {**mixed, "schedule": {"kind": "constant"}}
    whole = elsewhere(shorter, tmp_path, "constant")
    train(whole)
    train({**shorter, "run": {**shorter["run"], "steps": 5}})
    shutil.copytree(tmp_path / "books", tmp_path / "moved")
    shutil.rmtree(tmp_path / "books")
    shorter["data"]["mixture"]["books"]["corpus"]["source"] = str(tmp_path / "moved")
    train(shorter)
    one, other = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("constant", "run"))
    assert [r.get("loss") for r in one] == [r.get("loss") for r in other]
    assert [r.get("documents") for r in one] == [r.get("documents") for r in other]


def test_a_source_that_holds_out_what_another_trains_on_is_refused(mixed, tmp_path):
    for seed in range(3):
        shutil.copy(tmp_path / "books" / f"{seed}.txt", tmp_path / "code" / f"copy{seed}.txt")
    with pytest.raises(ValueError, match=r"data\.mixture\.books\.held_out, beside data\.mixture\.code: 1 of its 1 doc"):
        train(mixed)
    for source in mixed["data"]["mixture"].values():
        source["held_out"]["shared"] = "remove"
    train(mixed)


def test_what_is_wrong_with_a_mixture_is_named(mixed, tmp_path):
    mixed["data"]["corpus"] = {"source": str(tmp_path)}
    with pytest.raises(ValueError, match=r"data\.corpus: contradicts data\.mixture"):
        train(mixed)
    del mixed["data"]["corpus"]
    mixed["data"]["mixture"]["code"]["corpus"]["source"] = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"data\.mixture\.code: .*gone"):
        train(mixed)
    mixed["data"]["mixture"] = {"a/b": {"corpus": {"source": "stdlib"}}}
    with pytest.raises(ValueError, match=r"data\.mixture: a source's name, 'a/b'"):
        train(mixed)


# --- resuming follows content -------------------------------------------------------------------------------


def test_touched_and_moved_files_are_the_same_text(tiny, tmp_path):
    train(elsewhere(tiny, tmp_path, "whole"))
    tiny["schedule"]["kind"] = "constant"
    train(elsewhere(tiny, tmp_path, "constant"))
    train({**tiny, "run": {**tiny["run"], "steps": 4}})
    for path in (tmp_path / "texts").iterdir():
        os.utime(path, (1, 1))
    train({**tiny, "run": {**tiny["run"], "steps": 8}})
    (tmp_path / "texts").rename(tmp_path / "elsewhere")
    tiny["data"]["corpus"]["source"] = str(tmp_path / "elsewhere")
    tiny["data"]["cache_folder"] = str(tmp_path / "other cache")
    train(tiny)
    one, other = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("constant", "run"))
    assert [r.get("loss") for r in one] == [r.get("loss") for r in other]


def test_a_replaced_held_out_file_is_noticed(tiny, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text(words(99, 200))
    tiny["data"]["held_out"] = {"corpus": {"source": str(held)}}
    train(tiny)
    text = held.read_text()
    status = held.stat()
    held.write_text(text[:-5] + text[-2:-6:-1] + "\n")  # as long, and dated as before
    os.utime(held, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=r"the held-out text is another than it was: as many documents and tokens"):
        train(tiny)
    held.write_text(words(98, 300))
    with pytest.raises(
        ValueError, match=r"held-out text is another than it was: 1 documents with .* before, 1 doc"
    ) as e:
        train(tiny)
    assert not any(len(word) == 64 for word in str(e.value).split())
    held.write_text(text)
    train(tiny)


def test_another_tokenizer_at_the_same_place_is_noticed(tiny, tmp_path):
    train_bpe([[words(1, 500)]], 270).save(tmp_path / "tokenizer")
    tiny["tokenizer"] = str(tmp_path / "tokenizer")
    train(tiny)
    shutil.rmtree(tmp_path / "tokenizer")
    train_bpe([["abc acb cab " * 90]], 270).save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"the tokenizer of the training text is another|vocab_size"):
        train(tiny)


# --- runs that grow -----------------------------------------------------------------------------------------


def test_a_stable_rate_goes_on_as_if_the_run_had_been_longer(tiny, tmp_path, capsys):
    tiny["schedule"] = {"kind": "warmup-stable-decay", "warmup_steps": 2, "decay_steps": 4}
    train(elsewhere(tiny, tmp_path, "whole"))
    train({**tiny, "run": {**tiny["run"], "steps": 8}, "checkpoint": {"every": 4, "keep": 9}})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    train(tiny)
    assert "run.steps: 8 before, 12 now; the rate falls from step 8 on" in capsys.readouterr().out
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_after_the_decay_it_goes_on_and_says_what_the_rate_does(tiny, tmp_path, capsys):
    tiny["schedule"] = {"kind": "warmup-stable-decay", "warmup_steps": 2, "decay_steps": 4}
    train({**tiny, "run": {**tiny["run"], "steps": 8}})
    train(tiny)
    out = capsys.readouterr().out
    assert "It had begun to fall at step 4: it was to be 0.0003 here and is 0.003" in out
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(13))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_rate_that_follows_the_length_says_what_it_would_mean(tiny, kind):
    tiny["schedule"] = {"kind": kind}
    train({**tiny, "run": {**tiny["run"], "steps": 8}})
    message = (
        rf"run\.steps: 8 before, 12 now: with schedule\.kind {kind} .* was to be 0\.0003 and would jump to 0\.00\d+"
    )
    with pytest.raises(CheckpointError, match=message):
        train(tiny)


def test_lengths_that_change():
    for kind in ("constant", "warmup-stable-decay", "cosine", "linear"):
        config = ScheduleConfig(kind=kind)
        assert "has made 50 steps already" in length_change(config, 1e-3, 100, 40, 50)[0]
    stable = ScheduleConfig(kind="warmup-stable-decay")
    refused, told = length_change(stable, 1.0, 100, 200, 90)
    assert refused is None and "falls from step 180 on" in told and "begun" not in told
    assert all(learning_rate_ratio(step, 100, stable) == learning_rate_ratio(step, 200, stable) for step in range(90))


# --- what is noticed before a step --------------------------------------------------------------------------


def test_init_from_with_another_tokenizer_of_the_same_size_is_refused(tiny, tmp_path):
    for name, text in (("one", words(1, 500)), ("two", "abc acb cab bca " * 90)):
        train_bpe([[text]], 262).save(tmp_path / name)
    tiny["tokenizer"] = str(tmp_path / "one")
    tiny["model"]["vocab_size"] = 262
    train(tiny)
    tuned = {**tiny, "model": {"init_from": str(tmp_path / "run")}, "run": {"steps": 2, "folder": str(tmp_path / "2")}}
    tuned["schedule"] = {}
    tuned["tokenizer"] = str(tmp_path / "two")
    with pytest.raises(ValueError, match=r"tokenizer: .*two' is another than that of model\.init_from .*: id \d+ is '"):
        train(tuned)
    model = load_model(tmp_path / "run", "cpu")
    with pytest.raises(ValueError, match="is another than the one in"):
        load_tokenizer_for(model, tmp_path / "run", str(tmp_path / "two"))
    tuned["tokenizer"] = str(tmp_path / "one")
    train(tuned)
    del tuned["tokenizer"]
    tuned["run"]["folder"] = str(tmp_path / "3")
    train(tuned)


def test_the_last_measurement_is_what_the_evaluation_says(tiny, tmp_path):
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": words(50 + i, 80)}) + "\n" for i in range(3)))
    tiny["data"]["held_out"] = {"corpus": {"source": str(tmp_path / "held.jsonl")}}
    tiny["evaluation"]["max_tokens"] = None
    train(tiny)
    model = load_model(tmp_path / "run", "cpu")
    corpus = Corpus({"source": str(tmp_path / "held.jsonl")})
    report = evaluate_perplexity(model, load_tokenizer(tmp_path / "run" / "model"), corpus.documents())["overall"]
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["heldout_bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=1e-5)
    assert last["heldout_loss"] == pytest.approx(report["loss"], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_stops_the_run(tiny, tmp_path, monkeypatch, value):
    calls = []

    def measured(*arguments, **options):
        calls.append(None)
        return HeldOutLoss(value if len(calls) == 3 else 2.0, None, 10)

    monkeypatch.setattr("megalodon.training.trainer.measure_heldout", measured)
    with pytest.raises(DivergedError, match=r"stopped at step 8: the held-out loss is .*step-000004") as caught:
        train(tiny)
    assert "\n" not in str(caught.value)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and not (tmp_path / "run" / "model").exists()


def test_no_number_that_is_none_is_written(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl", -1)
    with pytest.raises(ValueError, match="JSON"):
        lines.write({"step": 1, "loss": math.nan})
    assert (tmp_path / "m.jsonl").read_text() == ""
    lines.close()
    assert torch.isfinite(torch.tensor(heldout.HeldOutLoss(1.0, 1.0, 1).loss))


def test_what_was_left_out_or_looks_odd_is_said(tiny, tmp_path, capsys):
    (tmp_path / "texts" / "README.md").write_text("about these texts")
    with (tmp_path / "texts" / "0.txt").open("a") as file:
        file.write("one<|endoftext|>two<|endoftext|>")
    (tmp_path / "texts" / "rows.jsonl").write_text('{"text": "good"}\n{broken\n')
    tiny["data"]["corpus"]["bad_rows"] = "skip"
    tiny["run"]["steps"] = 2
    tiny["schedule"] = {}
    for _ in range(2):  # also when the cache is there already
        train(tiny)
        out = capsys.readouterr().out
        assert "README.md (about the corpus)" in out and "left out 1 bad row: " in out
        assert "spells <|endoftext|> 2 times: it is read as ordinary text and ends no document" in out
    tiny["data"]["corpus"]["separator"] = "<|endoftext|>"
    tiny["run"]["folder"] = str(tmp_path / "split")
    train(tiny)
    out = capsys.readouterr().out
    assert "spells" not in out and "text: 5 documents" in out


def test_dry_runs_of_mixtures_read_back(mixed):
    from megalodon.training.config_file import config_text, parse_yaml

    config = launch.resolve(check_config(mixed, "test"), "test").config
    assert check_config(parse_yaml(config_text(config), "again"), "again") == config
    assert Path(config.run.folder).name == "run"
