"""Context files: resumed to the bit, and refused when they are another model's or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer
from megalodon.inference import Context, Sampling, Session, model_fingerprint

PROMPT = list(b"Call me Ishmael. Some years ago")


def make_model(**changes: object) -> MegalodonForCausalLM:
    torch.manual_seed(0)
    fields = {"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32}
    rest = {"vocab_size": 256, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4}
    return MegalodonForCausalLM(MegalodonConfig(**{**fields, **rest, **changes})).eval()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dim": 64}, "model_dim 32"),
        ({"chunk_size": 32}, "chunk_size 16"),
        ({"swiglu": True}, "other weights"),
        ({"norm_eps": 1e-6}, "other weights"),
    ],
)
def test_another_config_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Context.load(saved, make_model(**changes), ByteTokenizer())


def test_other_weights_and_dtypes_are_refused(saved: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].attention.o_proj.weight += 1e-3
    with pytest.raises(ValueError, match="other weights"):
        Context.load(saved, model, ByteTokenizer())
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        Context.load(saved, make_model().bfloat16(), ByteTokenizer())


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
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged\.context"):
            Context.load(damaged, make_model(), ByteTokenizer())


def test_what_is_no_context_is_refused(saved: Path, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Context.load(tmp_path / "nowhere", model, ByteTokenizer())
    Context.load(saved, model, ByteTokenizer()).state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="no context file"):
        Context.load(tmp_path / "state", model, ByteTokenizer())


def test_fingerprint_is_of_config_and_weights() -> None:
    assert model_fingerprint(make_model()) == model_fingerprint(make_model())
    assert model_fingerprint(make_model(dropout=0.1)) == model_fingerprint(make_model()), "dropout changes no output"
    assert model_fingerprint(make_model(rope_base=1e5)) != model_fingerprint(make_model())
