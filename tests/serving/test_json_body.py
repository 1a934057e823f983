"""Bodies are read as `json.loads` reads them, in pieces; what is wrong is one error that names the field."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.serving.bodies import check
from megalodon.serving.errors import ApiError
from megalodon.serving.json_body import MOST_DEPTH, MOST_VALUES, PIECE, parse
from megalodon.serving.response_schemas import ResponsesRequest
from megalodon.serving.schemas import ChatRequest, CompletionRequest
from megalodon.serving.texts import LongText, Numbers, plain

MEGABYTE = 1 << 20
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=200) | st.sampled_from(
    ['a\\"b\n' * 30, "\\" * 99, "😀é€" * 40, '","', "[1,2]", "{}"]
)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(st.integers(-9, 10**6), max_size=40)
        | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=20,
)


@given(value=st.dictionaries(texts, values, max_size=5), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_any_object_is_read_as_it_was_written(value: dict, ascii_only: bool, indent: int | None) -> None:
    written = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert plain(parse(written)) == value == plain(parse(b"\xef\xbb\xbf" + written))


@pytest.mark.parametrize("text", ["\n" * 99_999, "aé€😀" * 40_000, '\\"' * 99_999, "😀" * 70_000, "a" * (PIECE + 1)])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_long_strings_are_kept_in_pieces(text: str, ascii_only: bool) -> None:
    found = parse(json.dumps({"prompt": text}, ensure_ascii=ascii_only).encode())["prompt"]
    assert isinstance(found, LongText) and str(found) == text and found.nbytes == len(text.encode())


def test_long_lists_of_numbers_are_arrays() -> None:
    numbers = [*range(-5, 100_000), 2**40]
    found = parse(json.dumps({"prompt": [numbers, [1, 2]]}).encode())["prompt"]
    assert isinstance(found[0], Numbers) and found[0].values.tolist() == numbers and found[1] == [1, 2]


def large(prompt: bytes, size: int = MEGABYTE) -> bytes:
    return b'{"model": "x", "prompt": [' + prompt * (size // len(prompt)) + b"1]}"


WRONG = {
    "lists": large(b"[],"),
    "objects": large(b"{},"),
    "strings": large(b'"a",'),
    "halves": large(b"1.5,"),
    "a string last": large(b"1,")[:-3] + b'"x"]}',
    "negative": large(b"-1,"),
    "keys": b'{"model": "x", ' + b",".join(b'"%d": 1' % i for i in range(100_000)) + b"}",
    "unknown keys": b'{"model": "x", ' + b",".join(b'"%d": 1' % i for i in range(20_000)) + b"}",
    "nested": b'{"prompt": ' + b"[" * MEGABYTE + b"}",
    "digits": b'{"prompt": ' + b"9" * MEGABYTE + b"}",
    "fraction": b'{"temperature": 1.' + b"9" * MEGABYTE + b"}",
    "commas": b'{"prompt": [' + b"," * MEGABYTE + b"]}",
    "quotes": b'{"prompt": ' + b'"' * MEGABYTE + b"}",
    "colons": b'{"prompt"' + b":" * MEGABYTE + b"}",
    "backslashes": b'{"prompt": "' + b"\\" * (MEGABYTE + 1) + b'"}',
    "half a pair": b'{"prompt": "' + b"a" * MEGABYTE + b'\\ud800"}',
    "control": b'{"prompt": "' + b"\x01" * MEGABYTE + b'"}',
    "not UTF-8": b'{"prompt": "' + b"\xff" * MEGABYTE + b'"}',
    "stop": b'{"model": "x", "stop": [' + b"1.5," * 30_000 + b"1]}",
    "white space": b'{"model": "x", "prompt": ' + b" " * (3 * MEGABYTE) + '"😀"}'.encode(),
    "long numbers": b'{"x": [' + b",".join([b"[" + b",".join([b"9" * 4299] * 16) + b"]"] * 40) + b"]}",
    "a long name": b'{"model": "x", "' + b"\\n" * (MEGABYTE // 2) + b'": 1}',
    "a long name inside": b'{"model": "x", "metadata": {"' + "😀".encode() * (MEGABYTE // 4) + b'": 1}}',
    "biases": b'{"model": "x", "logit_bias": {' + b",".join(b'"%d":""' % i for i in range(30_000)) + b"}}",
    "unknown keys inside": b'{"save_context": {' + b",".join(b'"%d":1' % i for i in range(30_000)) + b"}}",
    "no end": b'{"model": "x", "prompt": "' + b"a" * MEGABYTE,
    "a long expression": b'{"model": "x", "guided_regex": "' + "😀".encode() * (MEGABYTE // 4 + 1) + b'"}',
    "long choices": b'{"model": "x", "guided_choice": [' + b",".join(b'"%d"' % i for i in range(2000)) + b"]}",
    "numbers in a schema": b'{"model": "x", "guided_json": {"enum": ' + b"[" + b"1," * MEGABYTE + b"1]}}",
    "metadata keys": b'{"model": "x", "prompt": 5, "metadata": {'
    + b",".join(b'"%d":0' % i for i in range(9999))
    + b"}}",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_megabyte_is_one_short_error_in_little_memory(name: str) -> None:
    body = WRONG[name]
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as refused:
            check(body, CompletionRequest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.status == 400 and len(refused.value.message) < 500
    assert peak < 8 * max(len(body), MEGABYTE), f"{peak / len(body):.1f} times its size"


@pytest.mark.parametrize(
    "body",
    [
        *(large(b"1,"), large(b"255, "), b'{"model": "x", "prompt": "' + b"a" * MEGABYTE + b'"}'),
        b'{"model": "x", "prompt": "' + "😀".encode() + b"a" * MEGABYTE + b'"}',
        b'{"model": "x", "prompt": "' + b"\\n" * (MEGABYTE // 2) + b'"}',
        b'{"model": "x", "prompt": [' + b",".join([b"[" + b"7," * 250 + b"7]"] * 2048) + b"]}",
        b'{"model": "x", "prompt": [' + b",".join([b'"' + b"\\u00e9" * 80 + b'"'] * 2048) + b"]}",
    ],
    ids=range(7),
)
def test_a_right_megabyte_takes_little_memory_too(body: bytes) -> None:
    tracemalloc.start()
    try:
        check(body, CompletionRequest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(body), f"{peak / len(body):.1f} times its size"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (WRONG["lists"], "prompt", f"more than {MOST_VALUES:,} values"),
        (WRONG["halves"], "prompt", "element 0 is 1.5"),
        (WRONG["negative"], "prompt", "element 0 is -1"),
        (WRONG["unknown keys"], "0", "no such field"),
        (WRONG["nested"], "prompt", f"deeper than {MOST_DEPTH}"),
        (WRONG["stop"], "stop", "valid"),
        (WRONG["biases"], "logit_bias", "30,000 members"),
        (WRONG["unknown keys inside"], "save_context.0", "not permitted"),
        (WRONG["white space"], "body", "white space"),
        (WRONG["long numbers"], "body", "numbers"),
        (WRONG["a long name"], "body", "name has more"),
        (WRONG["no end"], "body", "no end"),
        (WRONG["a long expression"], "guided_regex", "bytes, the most"),
        (WRONG["numbers in a schema"], "guided_json", "4,096 numbers"),
        (b'{"model": "x", "seed": ' + b"9" * 4301 + b"}", "body", "digits"),
        (b'{"model": "x", "prompt": [' + b"1," * PIECE + b"9" * 4301 + b"]}", "body", "digits"),
        (b'{"model": "x", "prompt": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "x", "nested deeper"),
        (b'{"model": "x", "prompt": [1, true]}', "prompt", "element 1 is true"),
        (b'{"model": "x", "prompt": ["a", 1]}', "prompt", "valid string"),
        (b'{"model": "x", "prompt": "a\\u0000b"}', "prompt", "NUL"),
        (b'{"model": "x", "prompt": "\\ud800"}', "prompt", "surrogate"),
        (b"[]", "body", "JSON object"),
        (b'{"model": "x"} 5', "body", "not JSON"),
        (b"\xff\xfe{\0}\0", "body", "not JSON"),
    ],
)
def test_errors_name_the_field(body: bytes, param: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        check(body, CompletionRequest)
    assert refused.value.param == param


def test_the_first_wrong_message_is_named() -> None:
    messages = [{"role": "user", "content": "x"}] * 3 + [{"role": "user", "content": 5}] * 4000
    with pytest.raises(ApiError, match="valid string") as refused:
        check(json.dumps({"model": "x", "messages": messages}).encode(), ChatRequest)
    assert refused.value.param == "messages.3.content"


def test_ids_are_kept_small() -> None:
    ids = check(large(b"255,"), CompletionRequest).prompt[0]
    assert isinstance(ids, np.ndarray) and ids.dtype == np.int32 and ids[0] == 255


def test_what_libraries_read_is_in_the_interpreters_own_types() -> None:
    schema = {"enum": [i / 2 for i in range(40)], "description": "long " * 20_000, "examples": list(range(100))}
    body = {"model": "x", "guided_json": schema, "stop_token_ids": list(range(20)), "chat_template_kwargs": schema}
    calls = [{"type": "function", "function": {"name": "f", "arguments": "x" * 99_999, "more": list(range(99))}}]
    body |= {"messages": [{"role": "assistant", "tool_calls": calls}]}
    asked = check(json.dumps(body).encode(), ChatRequest)
    assert asked.guided_json == asked.chat_template_kwargs == schema and asked.messages[0].tool_calls == calls
    assert asked.stop_token_ids == list(range(20))
    form = {"type": "json_schema", "name": "x", "schema": schema}
    body = {"model": "x", "input": "a", "text": {"format": form}, "metadata": {"k": "v" * 512}}
    response = check(json.dumps(body).encode(), ResponsesRequest)
    assert response.text.format.schema_ == schema and response.metadata == {"k": "v" * 512}


def test_long_numbers_are_found_wherever_they_begin() -> None:
    for before in (0, 1, PIECE - 4302, PIECE - 4301, PIECE - 4300, PIECE - 1, PIECE, 3 * PIECE - 4301):
        for digits, good in ((4300, True), (4301, False)):
            body = b'{"a": ' + b" " * before + b"9" * digits + b" " * (2 * PIECE) + b"}"
            if good:
                assert parse(body)["a"] > 0
            else:
                with pytest.raises(ApiError, match="digits"):
                    parse(body)
