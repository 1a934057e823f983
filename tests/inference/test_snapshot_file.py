"""Context files: every kind of damage and every stranger's file is refused, forged ones included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine_cases import CHUNK, make_engine, make_model, run, submit, text_tokens
from megalodon import GeckoConfig, GeckoForCausalLM, KinConfig, KinForCausalLM
from megalodon.inference.snapshot import Segment, Snapshot
from megalodon.inference.snapshot_file import _checksum, load_snapshot, save_snapshot


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    engine = make_engine()
    snapshot = run(engine, submit(engine, text_tokens(1, 40), max_tokens=5, keep=True)).snapshot
    save_snapshot(tmp_path / "a.context", snapshot, engine.identity)
    return tmp_path / "a.context"


def test_saved_and_loaded_is_the_same(saved: Path) -> None:
    snapshot = load_snapshot(saved, make_engine().identity)
    assert snapshot.tokens == 45 and [(one.kind, len(one.tokens)) for one in snapshot.tail] == [
        ("read", 8),
        ("generated", 5),
    ]
    save_snapshot(saved.with_name("b.context"), snapshot, make_engine().identity)
    again = load_snapshot(saved.with_name("b.context"), make_engine().identity)
    assert again.text_fingerprint == snapshot.text_fingerprint and torch.equal(again.generator, snapshot.generator)
    mine, theirs = again.state.state_dict(), snapshot.state.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["a.context", "b.context"]


@pytest.mark.parametrize("length", [5, CHUNK + 1, 3 * CHUNK + 4])
def test_contexts_of_models_that_keep_more_than_an_open_chunk(tmp_path: Path, length: int) -> None:
    sizes = {"vocab_size": 256, "num_layers": 2, "model_dim": 32, "num_heads": 2}
    gecko = {"z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32, "cema_ndim": 4, "chunk_size": CHUNK}
    for model in (
        GeckoForCausalLM(GeckoConfig(**sizes, **gecko, norm_num_groups=4)),
        KinForCausalLM(KinConfig(**sizes, mixers="attention")),
    ):
        engine = make_engine(model.eval())
        whole = run(engine, submit(engine, text_tokens(1, length), max_tokens=30)).tokens()
        first = run(engine, submit(engine, text_tokens(1, length), max_tokens=11, keep=True))
        save_snapshot(tmp_path / "context", first.snapshot, engine.identity)
        other = make_engine(model)
        start = load_snapshot(tmp_path / "context", other.identity)
        more = run(other, submit(other, start=start, max_tokens=19, seed=None, resume_generator=True))
        assert first.tokens() + more.tokens() == whole


def test_every_kind_of_damage_is_noticed(saved: Path) -> None:
    identity, whole = make_engine().identity, saved.read_bytes()
    for place in range(8, len(whole), 61):
        changed = bytearray(whole)
        changed[place] ^= 4
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match="context"):
            load_snapshot(saved, identity)
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_snapshot(saved, identity)


def test_strangers_are_refused_with_the_reason(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_snapshot(saved.with_name("nowhere"), make_engine().identity)
    other = make_model()
    with torch.no_grad():
        other.model.layers[1].attention.o_proj.weight += 1e-3
    for model in (other, make_model(model_dim=64)):
        with pytest.raises(ValueError, match="another model"):
            load_snapshot(saved, make_engine(model).identity)
    with pytest.raises(ValueError, match=r"made in float32; this model runs in bfloat16"):
        load_snapshot(saved, make_engine(make_model(torch.bfloat16)).identity)
    with pytest.raises(ValueError, match=r"tokenizer 'bytes', not with 'novel'"):
        load_snapshot(saved, replace(make_engine().identity, tokenizer="0", tokenizer_name="novel"))
    with pytest.raises(ValueError, match="reading 16 tokens at once; this server reads 8"):
        load_snapshot(saved, make_engine(piece=8).identity)
    save_file({"x": torch.zeros(1)}, saved)
    with pytest.raises(ValueError, match="not a context file"):
        load_snapshot(saved, make_engine().identity)


def forge(path: Path, header: dict | None = None, **tensors: torch.Tensor | None) -> None:
    """Change a file and give it the checksum that fits."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        contents = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        contents.pop(name, None)
        if tensor is not None:
            contents[name] = tensor
    written = json.dumps({**json.loads(metadata["context"]), **(header or {})}, sort_keys=True)
    save_file(contents, path, {**metadata, "context": written, "checksum": _checksum(written, contents)})


def test_forged_files_are_refused(saved: Path) -> None:
    identity, whole = make_engine().identity, saved.read_bytes()
    nan, heads = torch.full((1, 4), torch.nan, dtype=torch.float64), torch.zeros(1, 9, 2, 8)
    forgeries: list[tuple[dict, dict]] = [
        ({}, {"state.layers.0.norm.mean": nan}),
        ({}, {"state.layers.0.norm.var": -torch.ones(1, 4, dtype=torch.float64)}),
        ({}, {"state.layers.0.norm.mean": torch.zeros(1, 4, dtype=torch.int64)}),
        ({}, {"state.layers.0.cema": torch.zeros(1, 32, 4, 2, dtype=torch.int32)}),
        ({}, {"state.layers.0.keys": heads, "state.layers.0.values": heads.new_zeros(1, 9, 2, 16)}),
        ({}, {"state.layers.1.cema": None}),
        ({}, {"state.position": torch.tensor([32, 32])}),
        ({}, {"state.position": torch.tensor([31])}),
        ({}, {"tail.tokens": torch.full((13,), 256)}),
        ({}, {"tail.tokens": torch.full((13,), -1)}),
        ({}, {"tail.tokens": torch.zeros(13)}),
        ({}, {"tail.tokens": torch.ones(13, 1, dtype=torch.int64)}),
        ({}, {"tail.tokens": torch.ones(17, dtype=torch.int64), "tail.kinds": torch.zeros(17, dtype=torch.uint8)}),
        ({}, {"tail.kinds": torch.full((13,), 7, dtype=torch.uint8)}),
        ({}, {"tail.kinds": torch.zeros(12, dtype=torch.uint8)}),
        ({}, {"tail.tokens": None}),
        ({}, {"generator": torch.zeros(3, dtype=torch.uint8)}),
        ({}, {"generator": None}),
        ({"position": 48}, {}),
        ({"position": -16}, {"state.position": torch.tensor([-16])}),
        ({"position": 31}, {"state.position": torch.tensor([31])}),
        ({"position": 1e300}, {}),
        ({"block": None, "piece": None}, {}),
        ({"read_only": True, "digest": None, "text": None}, {}),
        ({"tokens": 10**9}, {}),
        ({"recent": [256]}, {}),
        ({"recent": ["x"]}, {}),
        ({"recent": [1] * 300}, {}),
        ({"recent": None}, {}),
        ({"recent": [2**70]}, {}),
        ({"recent": [1.5]}, {}),
        ({"recent": [[1]]}, {}),
        ({"digest": "zz"}, {}),
        ({"more": 1}, {}),
    ]
    for header, tensors in forgeries:
        saved.write_bytes(whole)
        forge(saved, header, **tensors)
        with pytest.raises(ValueError, match=r"damaged|has shape|lacks"):
            load_snapshot(saved, identity)
    for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.uint16):
        for name in ("state.layers.0.cema", "state.position", "tail.tokens", "tail.kinds", "generator"):
            saved.write_bytes(whole)
            with safe_open(saved, "pt") as file:
                shape = file.get_tensor(name).shape
            forge(saved, **{name: torch.zeros(shape).to(dtype)})
            with pytest.raises(ValueError, match="damaged"):
                load_snapshot(saved, identity)
    saved.write_bytes(whole)
    forge(saved)
    load_snapshot(saved, identity)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_context_in_fewer_bytes_is_read_by_anybody_and_shared_as_no_exact_text(tmp_path: Path, storage) -> None:
    model = make_model()
    ids = text_tokens(1, 5).tolist()
    state = model(torch.tensor([ids]), use_cache=True).past_key_values.detach()
    identity = replace(make_engine().identity, block=None, piece=None)
    tail = (Segment("read", np.array([7], dtype=np.int64)),)
    snapshot = Snapshot(state, 5, None, False, tuple(ids), tail)
    save_snapshot(tmp_path / "exact", snapshot, identity)
    save_snapshot(tmp_path / "small", snapshot, replace(identity, storage=storage))
    small = load_snapshot(tmp_path / "small", identity)
    assert small.tokens == 6 and not small.read_only
    mine, theirs = small.state.state_dict(), load_snapshot(tmp_path / "exact", identity).state.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0.1, atol=0.05)
        assert torch.equal(mine[name], tensor) != name.endswith((".keys", ".values")), name
