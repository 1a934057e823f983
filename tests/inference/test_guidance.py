"""Forms of answers: whatever is chosen among what is allowed ends as what was asked for, with any tokenizer."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megalodon.data import ByteTokenizer
from megalodon.data.pretrained import PretrainedTokenizer
from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.guidance import MOST_CHOICES, MOST_EXPRESSION, MOST_SCHEMA, Grammar, Grammars, closed

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Zoë"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def bpe() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(['{"name": "Ann", "age": 12, "tags": ["true", "false"]}'] * 9, trainer)
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"), "bpe")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe()


def part(i: int) -> dict:
    return {"type": "object", "properties": {f"a{i}": {"type": "string"}, f"b{i}": {}}, "required": [f"a{i}"]}


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int) -> str:
    follower, rng, ids = grammar.follow(), random.Random(seed), []
    for _ in range(400):
        if follower.complete:
            break
        allowed = follower.restrict(torch.zeros(tokenizer.vocab_size + 8)).isfinite().nonzero()[:, 0].tolist()
        token = rng.choice(allowed)
        if token == tokenizer.eos_token_id:
            break
        follower.take(token)
        ids.append(token)
    return b"".join(tokenizer.token_bytes[token] for token in ids).decode()


@pytest.mark.parametrize("seed", range(8))
def test_any_walk_ends_in_the_form(tokenizer: Tokenizer, seed: int) -> None:
    grammars = Grammars(tokenizer)
    found = json.loads(walk(grammars.json_schema(SCHEMA), tokenizer, seed))
    assert found["name"] in ("Ann", "Zoë") and 0 <= found["age"] <= 120 and len(found["tags"]) <= 2
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}/x", walk(grammars.regex(r"\d{4}-\d{2}/x"), tokenizer, seed), re.ASCII)
    assert walk(grammars.choice(['a "b"', "naïve", "/"]), tokenizer, seed) in ('a "b"', "naïve", "/")
    assert walk(grammars.lark('start: "a"~3 "b"'), tokenizer, seed) == "aaab"


def test_objects_have_the_properties_that_are_named(tokenizer: Tokenizer) -> None:
    inner = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    schema = {
        "type": "object",
        "properties": {"a": inner, "c": {"anyOf": [inner, {"type": "null"}]}},
        "required": ["a"],
    }
    for seed in range(6):
        found = json.loads(walk(Grammars(tokenizer).json_schema(schema), tokenizer, seed))
        assert found.keys() <= {"a", "c"} and found["a"].keys() == {"b"}
    for left in (
        {"allOf": [inner]},
        {"properties": {}, "additionalProperties": {"type": "null"}},
        {"type": "string"},
        True,
    ):
        assert closed(left) == left


def test_what_is_required_may_be_there_without_being_described() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a", "b"]}
    assert closed(schema)["properties"] == {"a": {"type": "boolean"}, "b": {}}
    grammar = Grammars(ByteTokenizer()).json_schema({"type": "object", "properties": {"p": schema}, "required": ["p"]})
    follower = grammar.follow()
    for byte in b'{"p":{"a":true,"b":[1,"x"]}}':
        assert follower.restrict(torch.zeros(256)).isfinite()[byte]
        follower.take(byte)
    assert follower.complete


def test_any_object_begins_as_one() -> None:
    first = Grammars(ByteTokenizer()).json_object().follow().restrict(torch.zeros(256))
    assert first.isfinite().nonzero()[:, 0].tolist() == [ord("{")]


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("json_schema", {"type": "objekt"}, "objekt"),
        ("json_schema", {"not": {}}, "not"),
        ("json_schema", {"$ref": "http://example.org/x"}, "example.org"),
        ("regex", "a(", "unclosed group"),
        ("choice", ["a\0"], "NUL"),
        ("regex", "x" * (MOST_EXPRESSION + 1), "the most that is accepted"),
        ("lark", "#" * (MOST_EXPRESSION + 1), "the most that is accepted"),
        ("choice", ["x" * MOST_CHOICES], "the most that is accepted"),
        ("json_schema", {"description": "x" * MOST_SCHEMA}, "the most that is accepted"),
        ("json_schema", {"items": [{"pattern": "x" * (MOST_EXPRESSION // 2 + 1)}] * 2}, "its patterns have"),
        ("json_schema", {"patternProperties": {"x" * (MOST_EXPRESSION + 1): {}}}, "its patterns have"),
        ("json_schema", {"allOf": [{"anyOf": [part(i), part(i + 99)]} for i in range(14)]}, "complex|large"),
        ("lark", "start: x", "unknown name"),
    ],
)
def test_what_is_no_form_is_refused(method: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(Grammars(ByteTokenizer()), method)(value)


def test_tokens_without_bytes_are_refused() -> None:
    unknown = ByteTokenizer()
    unknown.token_bytes = None
    with pytest.raises(NotImplementedError, match="bytes for its tokens"):
        Grammars(unknown).regex("a")
