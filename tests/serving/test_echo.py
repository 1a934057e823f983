"""Echo with log-probabilities: checked against full forwards, however the text is cut; keys that do not collide."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch
from serving_cases import Server

from engine_cases import make_model
from megalodon.serving import generating

TEXT = "It is a truth universally acknowledged, naïve € and 😀. " * 3
BODY = {"model": "tiny", "echo": True, "max_tokens": 0, "seed": 1}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def ask(client: httpx.Client, **body: object) -> dict:
    answer = client.post("/v1/completions", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected(ids: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows each token, by one forward over all."""
    with torch.inference_mode():
        return make_model()(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def check(ids: list[int], logprobs: dict, first: int = 0) -> None:
    """`logprobs` are of ids[first:]."""
    right = expected(ids)
    values = logprobs["token_logprobs"]
    assert len(values) == len(ids) - first == len(logprobs["tokens"])
    assert (values[0] is None) == (first == 0)
    for place, value in enumerate(values, first):
        if value is not None:
            assert value == pytest.approx(float(right[place - 1, ids[place]]), abs=1e-4)
    for place, likeliest in enumerate(logprobs["top_logprobs"] or [], first):
        if likeliest is not None:
            best = right[place - 1].max()
            assert max(likeliest.values()) == pytest.approx(float(best), abs=1e-4) and len(likeliest) in (3, 4)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 200])
def test_scores_are_those_of_a_full_forward(client: httpx.Client, length: int) -> None:
    ids = list((TEXT * 2).encode())[:length]
    for _ in range(2):  # the second time beginnings are known
        answer = ask(client, prompt=ids, logprobs=3)
        choice = answer["choices"][0]
        check(ids, choice["logprobs"])
        assert choice["text"] == bytes(ids).decode(errors="replace") and choice["finish_reason"] == "length"
        assert answer["usage"]["prompt_tokens"] == length and answer["usage"]["completion_tokens"] == 0


def test_the_answer_follows_the_prompt(client: httpx.Client) -> None:
    plain = ask(client, prompt=TEXT, max_tokens=9, echo=False, logprobs=2)["choices"][0]
    both = ask(client, prompt=TEXT, max_tokens=9, logprobs=2)["choices"][0]
    assert both["text"] == TEXT + plain["text"]
    size = len(TEXT.encode())
    assert both["logprobs"]["token_logprobs"][size:] == plain["logprobs"]["token_logprobs"]
    offsets = both["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[size] == len(TEXT) and offsets[3] == 3
    assert ask(client, prompt=TEXT, max_tokens=9, n=2)["choices"][1]["text"].startswith(TEXT)


def test_a_stream_gives_the_same(client: httpx.Client, server: Server) -> None:
    whole = ask(client, prompt=[TEXT, "abc"], max_tokens=5, logprobs=1, n=2)["choices"]
    stream = server.openai().completions.create(
        **{**BODY, "prompt": [TEXT, "abc"], "max_tokens": 5, "logprobs": 1, "n": 2, "stream": True}
    )
    texts, values = [""] * 4, [[] for _ in range(4)]
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        values[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice["text"] for choice in whole]
    assert values == [choice["logprobs"]["token_logprobs"] for choice in whole]


def test_after_a_context_every_token_has_its_score(client: httpx.Client) -> None:
    """Also where the context ends with tokens that were generated."""
    for more in (0, 5, 21):
        name = f"echo {more}"
        client.post("/v1/contexts", json={"text": TEXT, "name": name})
        generated: list[int] = []
        if more:
            body = {"model": "tiny", "context": name, "max_tokens": more, "seed": 3, "ignore_eos": True}
            saved = client.post(
                "/v1/completions", json={**body, "logit_bias": {"120": 100}, "save_context": {"replace": True}}
            )
            assert saved.json()["choices"][0]["text"] == "x" * more
            generated = [120] * more
        prompt = "and so on"
        logprobs = ask(client, context=name, prompt=prompt, logprobs=2)["choices"][0]["logprobs"]
        ids = [*TEXT.encode(), *generated, *prompt.encode()]
        check(ids, logprobs, len(ids) - len(prompt))


def test_scores_are_the_same_among_others(client: httpx.Client) -> None:
    alone = ask(client, prompt=TEXT, logprobs=2)["choices"][0]
    among = ask(client, prompt=[f"text {i} " * i for i in range(1, 12)] + [TEXT], logprobs=2)["choices"][11]
    assert among["logprobs"] == alone["logprobs"]


def test_byte_tokens_have_keys_of_their_own(client: httpx.Client) -> None:
    logprobs = ask(client, prompt="é😀" * 3, logprobs=20)["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xf0"]
    for likeliest in logprobs["top_logprobs"][1:]:
        assert len(likeliest) in (20, 21)
    assert logprobs["text_offset"][:7] == [0, 0, 1, 1, 1, 1, 2]


def test_the_token_that_ends_the_text_is_told(client: httpx.Client) -> None:
    """Evaluation harnesses drop the last token, which is the generated one."""
    choice = ask(client, prompt="abc", max_tokens=5, logprobs=1, logit_bias={"0": 100})["choices"][0]
    assert choice["text"] == "abc" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "token_id:0"]


def test_too_many_scores_are_refused(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "MOST_SCORES", 100)
    answer = client.post("/v1/completions", json={**BODY, "prompt": "x" * 64, "logprobs": 1})
    assert answer.status_code == 413 and answer.json()["error"]["param"] == "echo"
    assert ask(client, prompt="x" * 40, logprobs=0)["choices"]
