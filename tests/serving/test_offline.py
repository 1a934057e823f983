"""OpenAI's batch files: answered as the endpoints would, in order, gone on with, checked before work starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_cases import make_engine
from megalodon.inference.engine import Engine
from megalodon.serving.offline import run_openai_batch

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
ASKED = [
    ("/v1/completions", {"prompt": "It was", "max_tokens": 4}),
    ("/v1/chat/completions", CHAT),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}),
    ("/v1/embeddings", {"input": ["a", "bc"]}),
    ("/v1/completions", {"prompt": ""}),
]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine().start()
    yield engine
    engine.close()


def write(path: Path, asked: list[tuple[str, dict]], **changes: object) -> Path:
    lines = [
        {"custom_id": f"c{i}", "method": "POST", "url": url, "body": {"model": "tiny", **body}}
        for i, (url, body) in enumerate(asked)
    ]
    lines[-1] |= changes
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_lines_are_answered_as_the_endpoints_would(engine: Engine, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", ASKED * 3), tmp_path / "out.jsonl"
    assert run_openai_batch(engine, source, target, "tiny") == 15
    whole = target.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"c{i}" for i in range(15)]
    first = [answer["response"] for answer in answers[:5]]
    assert [response["status_code"] for response in first] == [200, 200, 200, 200, 400]
    assert first[1]["body"]["object"] == "chat.completion" and first[2]["body"]["object"] == "response"
    assert len(first[3]["body"]["data"]) == 2 and first[4]["body"]["error"]["param"] == "prompt"
    for length in (0, len(whole) // 2, len(whole)):
        target.write_bytes(whole[:length])
        assert run_openai_batch(engine, source, target, "tiny") == 15
        again = [json.loads(line)["response"]["body"].get("choices") for line in target.read_bytes().splitlines()]
        assert again == [answer["response"]["body"].get("choices") for answer in answers], (
            "seeds are those of the lines"
        )
    write(source, [*ASKED * 3][::-1])
    with pytest.raises(ValueError, match="answers no line 1"):
        run_openai_batch(engine, source, target, "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "/v1/images"}, "url"),
        ({"method": "GET"}, "method"),
        ({"custom_id": "c0"}, "that of an earlier line"),
        ({"more": 1}, "more"),
        ({"body": {"model": "gpt"}}, "body.model: 'gpt' is not 'tiny'"),
        ({"body": {"model": "tiny", "stream": True}}, "body.stream"),
    ],
)
def test_a_wrong_line_is_named_before_work_starts(engine: Engine, tmp_path: Path, changes: dict, message: str) -> None:
    source, target = write(tmp_path / "in.jsonl", ASKED, **changes), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=rf"in\.jsonl:5: .*{message}"):
        run_openai_batch(engine, source, target, "tiny")
    assert not target.exists()
