"""Context files of a `Session`: resumed to the bit, gone on from by the engine and back, refused when another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine_cases import CHUNK, make_engine, make_model, run, submit, text_tokens
from megalodon.data import ByteTokenizer
from megalodon.inference import Context, Sampling, Session, load_snapshot, save_snapshot

PROMPT = list(b"Call me Ishmael. Some years ago")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    session = Session(make_model(), seed=4)
    session.read(PROMPT)
    list(session.generate(11))
    session.context.save(tmp_path / "a.context", session.model, ByteTokenizer())
    return tmp_path / "a.context"


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(0.9, top_p=0.9, repetition_penalty=1.2)])
def test_resumed_from_a_file_equals_never_stopping(tmp_path: Path, sampling: Sampling) -> None:
    whole = Session(make_model(), seed=4)
    whole.read(PROMPT)
    expected = list(whole.generate(50, sampling))
    part = Session(make_model(), seed=4)
    part.read(PROMPT)
    tokens = list(part.generate(21, sampling))
    path = tmp_path / "a.context"
    part.context.save(path, part.model, ByteTokenizer())
    model = make_model()
    resumed = Session(model, Context.load(path, model, ByteTokenizer()))
    assert resumed.tokens == len(PROMPT) + 21
    assert tokens + list(resumed.generate(29, sampling)) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["a.context"]


# --- the engine's files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "generated"), [(1, 0), (1, 3), (CHUNK, 0), (CHUNK + 1, 0), (37, 0), (37, 6), (37, 12)]
)
def test_an_engine_goes_on_where_a_session_stopped(
    tmp_path: Path, dtype: torch.dtype, length: int, generated: int
) -> None:
    """To the bit from the session's state on: the same from its file, from memory, and in two goes."""
    model, path = make_model(dtype), tmp_path / "context"
    session = Session(model, seed=4)
    session.read(text_tokens(1, length))
    list(session.generate(generated))
    session.context.save(path, model, ByteTokenizer())
    engine = make_engine(model)
    start = load_snapshot(path, engine.identity)
    assert start.tokens == length + generated and start.text_fingerprint is None and not start.read_only
    whole = run(engine, submit(engine, text_tokens(2, 5), start, max_tokens=40, keep=True))
    assert whole.usage.prompt_tokens == length + generated + 5
    if dtype == torch.float32:
        likeliest = run(engine, submit(engine, text_tokens(2, 5), start, max_tokens=30, sampling=Sampling(0)))
        session.read(text_tokens(2, 5))
        assert [token for token, _ in likeliest.tokens()] == list(session.generate(30, Sampling(0)))
    for cut in (1, 13, 39):
        first = run(engine, submit(engine, text_tokens(2, 5), start, max_tokens=cut, keep=True))
        save_snapshot(path, first.snapshot, engine.identity)
        other = make_engine(make_model(dtype))
        options = {"seed": None, "resume_generator": True, "max_tokens": 40 - cut}
        second = run(other, submit(other, start=load_snapshot(path, other.identity), **options))
        assert first.tokens() + second.tokens() == whole.tokens()


@pytest.mark.parametrize(("length", "generated"), [(1, 0), (CHUNK, 0), (CHUNK + 1, 0), (37, 0), (37, 9), (37, 40)])
def test_a_session_goes_on_where_an_engine_stopped(tmp_path: Path, length: int, generated: int) -> None:
    model, path, greedy = make_model(), tmp_path / "context", Sampling(0)
    engine = make_engine(model)
    options = {"max_tokens": generated, "sampling": greedy} if generated else {"read_only": True}
    first = run(engine, submit(engine, text_tokens(1, length), keep=True, **options)).snapshot
    save_snapshot(path, first, engine.identity)
    expected = run(engine, submit(engine, text_tokens(2, 5), first, max_tokens=30, sampling=greedy)).tokens()
    session = Session(model, Context.load(path, model, ByteTokenizer()))
    assert session.tokens == length + generated
    session.read(text_tokens(2, 5))
    assert list(session.generate(30, greedy)) == [token for token, _ in expected]


def test_a_session_draws_on_as_the_engine_would_have(tmp_path: Path) -> None:
    model, path, sampling = make_model(), tmp_path / "context", Sampling(0.9, repetition_penalty=1.2)
    engine = make_engine(model)
    first = run(engine, submit(engine, text_tokens(1, 300), max_tokens=20, seed=3, sampling=sampling, keep=True))
    options = {"seed": None, "resume_generator": True, "sampling": sampling, "max_tokens": 30}
    expected = run(engine, submit(engine, start=first.snapshot, **options)).tokens()
    save_snapshot(path, first.snapshot, engine.identity)
    session = Session(model, Context.load(path, model, ByteTokenizer()))
    assert list(session.generate(30, sampling)) == [token for token, _ in expected]


def test_a_file_that_holds_no_token_is_refused(tmp_path: Path) -> None:
    engine = make_engine()
    save_snapshot(tmp_path / "a.context", engine.empty, engine.identity)
    with pytest.raises(ValueError, match="no token to go on from"):
        Context.load(tmp_path / "a.context", engine.model, ByteTokenizer())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"model_dim": 64}, {"chunk_size": 32}, {"swiglu": True}, {"norm_eps": 1e-6}])
def test_another_config_is_refused(saved: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"a\.context.*another model"):
        Context.load(saved, make_model(**changes), ByteTokenizer())


def test_other_weights_and_dtype_are_refused(saved: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].attention.o_proj.weight += 1e-3
    with pytest.raises(ValueError, match="another model"):
        Context.load(saved, model, ByteTokenizer())
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        Context.load(saved, make_model(torch.bfloat16), ByteTokenizer())


def test_another_tokenizer_is_refused(saved: Path) -> None:
    other = ByteTokenizer()
    other.name, other.fingerprint = "novel", "0"
    with pytest.raises(ValueError, match=r"'bytes'.*'novel'"):
        Context.load(saved, make_model(), other)


def test_every_kind_of_damage_is_noticed(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    damaged = tmp_path / "damaged.context"
    for place in range(8, len(whole), 97):  # the first eight bytes are the header's length
        changed = bytearray(whole)
        changed[place] ^= 4
        damaged.write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged\.context"):
            Context.load(damaged, make_model(), ByteTokenizer())
    for tenth in range(10):
        damaged.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ValueError, match=r"damaged\.context"):
            Context.load(damaged, make_model(), ByteTokenizer())


def test_what_is_no_context_is_refused(saved: Path, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Context.load(tmp_path / "nowhere", model, ByteTokenizer())
    Context.load(saved, model, ByteTokenizer()).state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="not a context file"):
        Context.load(tmp_path / "state", model, ByteTokenizer())
