"""Models of Transformers as controls: documents apart and states as values, in whatever way each class allows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from megalodon.models import PeerConfig, PeerForCausalLM, State, load_config
from megalodon.models.peers import probe
from megalodon.models.peers.probe import ways_of
from megalodon.parallel import mesh_problems
from megalodon.parallel.mesh import MeshSizes

SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA2 = {**SMALL, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}
KINDS = {
    "llama": {**SMALL, **HEADS},
    "mistral": {**SMALL, **HEADS, "sliding_window": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mamba": {**SMALL, "state_size": 8},
    "mamba2": MAMBA2,
    "recurrent_gemma": {**SMALL, **HEADS, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "qwen3_next": {
        **SMALL,
        **HEADS,
        **{"num_hidden_layers": 4, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
}


def config_of(kind: str, **fields) -> PeerConfig:
    return PeerConfig(kind=kind, fields={**KINDS[kind], **fields}, vocab_size=97)


QUICK = ("llama", "mistral", "gpt2", "mamba2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS],
)
def model(request: pytest.FixtureRequest) -> PeerForCausalLM:
    config = config_of(request.param)
    torch.manual_seed(0)
    return probe._moved(config)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_packed_documents_are_what_they_are_alone(model: PeerForCausalLM) -> None:
    ids, segments = torch.randint(0, 97, (3, 40)), torch.zeros(3, 40, dtype=torch.long)
    segments[0, 13:], segments[0, 17:], segments[1, 39:] = 1, 2, 1
    out = model(ids, segment_ids=segments, labels=ids, use_cache=False)
    alone = [part for row, cuts in enumerate([[13, 4, 23], [39, 1], [40]]) for part in ids[row].split(cuts)]
    expected = torch.cat([model.peer(part[None], use_cache=False).logits[0] for part in alone])
    assert relative(out.logits.flatten(0, 1), expected) < 1e-4
    again = model(ids, segment_ids=segments, labels=ids, use_cache=False, return_logits=False)
    assert again.logits is None and torch.allclose(again.loss, out.loss, rtol=1e-5)
    padded = model(ids, attention_mask=(segments == 0).long(), use_cache=False).logits
    assert relative(padded[1, :39], out.logits[1, :39]) < 1e-4 and bool((padded[1, 39] == 0).all())


@torch.no_grad()
def test_pieces_are_what_the_whole_is_and_states_are_values(model: PeerForCausalLM) -> None:
    ids = torch.randint(0, 97, (2, 60))
    whole = torch.cat([model.peer(row[None], use_cache=False).logits for row in ids])
    state, logits = None, []
    for piece in ids.split([20, 1, 3, 36], dim=1):
        before = state
        out = model(piece, past_key_values=before, use_cache=True)
        twice = model(piece, past_key_values=before, use_cache=True)
        assert torch.equal(out.logits, twice.logits)
        state = out.past_key_values
        assert isinstance(state, State)
        logits.append(out.logits)
    assert relative(torch.cat(logits, dim=1), whole) < 1e-4
    assert state.position.tolist() == [60, 60]
    again = model.read_state(state.state_dict())
    following = ids[:, :5]
    expected = model(following, past_key_values=state).logits
    assert torch.equal(model(following, past_key_values=again).logits, expected)
    mixed = state[[1, 0]].reset(torch.tensor([False, True]))
    out = model(following, past_key_values=mixed).logits
    assert relative(out[0], model(following[:1], past_key_values=state[1]).logits[0]) < 1e-5
    assert relative(out[1], model.peer(following[1:], use_cache=False).logits[0]) < 1e-4


@torch.no_grad()
def test_documents_that_end_and_begin_in_streamed_rows(model: PeerForCausalLM) -> None:
    ids = torch.randint(0, 97, (2, 30))
    segments = torch.zeros(2, 30, dtype=torch.long)
    segments[0, 4:], segments[0, 11:], segments[1, 9:] = 1, 2, 1
    first = model(ids, use_cache=True).past_key_values
    out = model(ids, segment_ids=segments, past_key_values=first, use_cache=True)
    going_on = torch.cat([ids[:1], ids[:1, :4]], dim=1)
    assert relative(out.logits[0, :4], model.peer(going_on, use_cache=False).logits[0, 30:]) < 1e-4
    assert relative(out.logits[0, 4:11], model.peer(ids[:1, 4:11], use_cache=False).logits[0]) < 1e-4
    assert out.past_key_values.position.tolist() == [19, 21]
    then = model(ids[:, :6], past_key_values=out.past_key_values).logits
    last = torch.cat([ids[1:, 9:], ids[1:, :6]], dim=1)
    assert relative(then[1], model.peer(last, use_cache=False).logits[0, 21:]) < 1e-4


class Spoilt(nn.Module):
    """A Llama with one fault."""

    def __init__(self, peer: nn.Module, fault: str) -> None:
        super().__init__()
        self.peer, self.config, self.fault = peer, peer.config, fault
        self.is_gradient_checkpointing = False

    def forward(self, ids, position_ids=None, **given):
        if self.fault == "positions":
            position_ids = None
        before = given.get("cache", given.get("past_key_values"))
        out = self.peer(ids, position_ids=position_ids, **given)
        if self.fault == "rows":
            out.logits = out.logits + 0.1 * out.logits.mean(0, keepdim=True)
        if self.fault == "future":
            out.logits = out.logits + 0.1 * out.logits.mean(1, keepdim=True)
        if self.fault == "pieces" and before is not None and ids.shape[1] > 1:
            out.logits = out.logits + 0.1 * out.logits[:, :1]
        if self.fault == "cache" and before is not None:
            out.logits = out.logits + 0.1 * ids[..., None] / 97
        if self.fault == "gradients":
            out.logits = out.logits + 0.5 * (out.logits - out.logits.detach())
        return out


@pytest.mark.parametrize(
    ("fault", "documents", "pieces", "problem"),
    [
        ("none", "positions", "pieces", "grows by 256 bytes with each token"),
        ("positions", "rows", "pieces", "grows by 256 bytes"),
        ("rows", "alone", "pieces", "grows by 256 bytes"),
        ("pieces", "positions", "tokens", "reads otherwise in pieces than whole"),
        ("cache", "positions", "text", "reads otherwise token by token than whole"),
        ("gradients", "positions", "pieces", "no right gradients where rows go on"),
    ],
)
def test_faults_are_found(fault: str, documents: str, pieces: str, problem: str, monkeypatch) -> None:
    kind = "mistral" if fault == "gradients" else "llama"  # only where nothing grows do gradients matter
    made = probe._made
    monkeypatch.setattr(probe, "_made", lambda inner: Spoilt(made(inner), fault))
    probe._ways_of.cache_clear()
    try:
        found = ways_of(config_of(kind))
    finally:
        probe._ways_of.cache_clear()
    assert (found.documents, found.pieces) == (documents, pieces)
    assert found.streaming_problem is not None and problem in found.streaming_problem


def test_a_model_that_sees_the_future_is_refused(monkeypatch) -> None:
    made = probe._made
    monkeypatch.setattr(probe, "_made", lambda inner: Spoilt(made(inner), "future"))
    with pytest.raises(ValueError, match="kind='llama': Spoilt is no causal model"):
        ways_of(config_of("llama", rms_norm_eps=2e-6))


def test_streaming_is_for_those_whose_pieces_equal_the_whole() -> None:
    assert config_of("mistral").streaming_problem() is None
    assert "grows by 256 bytes" in str(config_of("llama").streaming_problem())
    assert "has a longest text" in str(config_of("gpt2").streaming_problem())
    before = torch.get_rng_state()
    ways_of(config_of("llama", rms_norm_eps=3e-6))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "lama"}, "kind='lama': .* no such causal language model; did you mean llama"),
        ({"kind": "t5gemma"}, "kind='t5gemma'"),
        ({"fields": {"hidden_sise": 3}}, "a llama config has no field 'hidden_sise'; did you mean hidden_size"),
        ({"fields": {"vocab_size": 3}}, "fields: vocab_size follows from the tokenizer"),
        ({"fields": {"hidden_size": "wide"}}, "fields: llama: .*hidden_size"),
        ({"feilds": {}}, "feilds=.*; did you mean fields"),
    ],
)
def test_what_is_wrong_is_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeerConfig(**values)


def test_work_is_counted_as_it_runs() -> None:
    """Of a Llama: scores and weighted values of whole squares, in each layer."""
    config = config_of("llama")
    assert config.sequence_multiply_adds(64) == pytest.approx(2 * 2 * 64 * 32, rel=0.03)  # less the norms' weights


def test_one_process_trains_it() -> None:
    found = mesh_problems(MeshSizes(shard=2), config_of("llama"), world_size=2, batch_size=4, sequence_length=8)
    assert found == ["mesh: a transformers model is trained by one process"]


def test_folders_are_those_of_transformers(tmp_path) -> None:
    model = PeerForCausalLM(config_of("mamba2"))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Mamba2ForCausalLM"
    config = load_config(tmp_path)
    assert isinstance(config, PeerConfig) and config.inner().to_dict() == model.config.inner().to_dict()
    again = PeerForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))
