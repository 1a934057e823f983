"""`/v1/explain`: the relevance that `explain` finds, by character, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from serving_cases import Server

from engine_cases import make_model
from megalodon import KinConfig, KinForCausalLM
from megalodon.evaluation.explain import explain

TEXT = "“Yes”, she said, and yes."


def asked(server: Server, **fields: Any) -> Any:
    with server.http() as client:
        return client.post("/v1/explain", json={"model": "tiny", **fields})


def test_relevance_is_that_of_the_model(server: Server) -> None:
    ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
    right = explain(make_model(), ids)
    for prompt in (TEXT, ids.tolist(), [TEXT]):
        found = asked(server, prompt=prompt).json()
        assert found["token_ids"] == ids.tolist() and found["relevance"][-1] is None
        assert found["relevance"][:-1] == pytest.approx(right.relevance.tolist(), rel=1e-6)
        assert found["logprob"] == pytest.approx(right.log_probability, rel=1e-6)
        assert found["logprob_without"] == pytest.approx(right.areas(), rel=1e-6)
    assert found["text_offset"] == [place for place, letter in enumerate(TEXT) for _ in letter.encode()]


def test_of_a_long_text_the_end_counts(server: Server) -> None:
    text = "".join(f"{number}, " for number in range(200))
    found, alone = (asked(server, prompt=prompt).json() for prompt in (text, text[-256:]))
    assert len(found["relevance"]) == 256 and found["relevance"] == alone["relevance"]
    assert found["text_offset"][0] == len(text) - 256 and alone["text_offset"][0] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": "x"}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [1]}, 400, "prompt"),
        ({"prompt": ["one", "two"]}, 400, "prompt"),
        ({"prompt": [1, 2, 300]}, 400, "prompt"),
        ({"prompt": "x" * 70_000}, 413, "prompt"),
        ({"prompt": "y" * 3_000_000}, 413, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": "text", "token": 1}, 400, "token"),
        ({"prompt": "text", "model": "other"}, 404, "model"),
    ],
)
def test_what_is_refused_names_the_field(server: Server, fields: dict[str, Any], status: int, param: str) -> None:
    answer = asked(server, **fields)
    assert answer.status_code == status and answer.json()["error"]["param"] == param


def test_a_model_without_matrices_says_so(serve: Callable[..., Server]) -> None:
    config = KinConfig(mixers="gated_delta", num_layers=1, model_dim=32, num_heads=2, vocab_size=256)
    answer = asked(serve({"model": KinForCausalLM(config).eval()}), prompt="some text")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"
    assert "implicit attention" in answer.json()["error"]["message"]
