"""Batches: in order, resumable after a kill at any byte, and checked before work starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_cases import make_engine
from megalodon.inference.batch import run_batch, writing
from megalodon.inference.engine import Engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine().start()
    yield engine
    engine.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [
        {"id": i, "prompt": f"Prompt number {i} " * (1 + i % 4), "max_tokens": 1 + 7 * (i % 5), "n": 1 + i % 2}
        for i in range(36)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_in_order_and_repeatable(engine: Engine, source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    assert run_batch(engine, source, tmp_path / "out.jsonl", on_line=seen.append) == 36
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(36)) and seen == list(range(37))
    assert [len(answer["choices"]) for answer in answers] == [1 + i % 2 for i in range(36)]
    run_batch(engine, source, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    run_batch(engine, source, tmp_path / "other.jsonl", seed=1)
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


def test_goes_on_wherever_it_was_killed(engine: Engine, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    run_batch(engine, source, target)
    whole = target.read_bytes()
    for length in (0, 1, len(whole) // 2, whole.index(b"\n") + 1, len(whole) - 1, len(whole)):
        target.write_bytes(whole[:length])
        seen: list[int] = []
        run_batch(engine, source, target, on_line=seen.append)
        assert target.read_bytes() == whole and seen[0] == whole[:length].count(b"\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ""}', "prompt"),
        ("{}", "prompt: Field required"),
        ('{"prompt": "a", "max_token": 3}', "max_token: Extra"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1"),
        ('{"prompt": "a", "n": 100}', "16 slots"),
        ("nothing", "Invalid JSON"),
    ],
)
def test_a_wrong_line_is_named_before_work_starts(engine: Engine, source: Path, line: str, message: str) -> None:
    source.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=rf"in\.jsonl:2: .*{message}"):
        run_batch(engine, source, source.with_name("out.jsonl"))
    assert not source.with_name("out.jsonl").exists()


def test_the_output_of_another_input_is_refused(engine: Engine, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("{}\n" * 37)
    with pytest.raises(ValueError, match="another input"):
        run_batch(engine, source, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    run_batch(engine, source, tmp_path / "out.jsonl")
    whole, asked = (tmp_path / "out.jsonl").read_bytes(), source.read_text()
    for changed, seed in ((asked.replace("number 3 ", "number 4 "), 0), (asked, 1)):
        source.write_text(changed)
        with pytest.raises(ValueError, match=r"out\.jsonl:\d+ answers no line"):
            run_batch(engine, source, tmp_path / "out.jsonl", seed)
        assert (tmp_path / "out.jsonl").read_bytes() == whole
    source.write_text(asked.rstrip() + '\n{"prompt": "one more", "max_tokens": 3}\n')
    assert run_batch(engine, source, tmp_path / "out.jsonl") == 37, "lines may be added"
    assert (tmp_path / "out.jsonl").read_bytes().startswith(whole)
    with pytest.raises(FileNotFoundError):
        run_batch(engine, tmp_path / "nowhere", tmp_path / "out.jsonl")


def test_two_runs_do_not_write_one_output(engine: Engine, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"

    def other(_: int) -> None:
        with pytest.raises(ValueError, match="written by another run"), writing(source, target):
            raise AssertionError("it should have been refused")

    assert run_batch(engine, source, target, on_line=other) == 36
    with writing(source, target):
        pass
