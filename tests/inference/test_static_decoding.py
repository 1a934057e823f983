"""The static step against the model's own, across chunk boundaries, rows at different positions, on every back end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
from model_cases import VOCABULARY, relative, state_difference, tiny_model

from megalodon import MegalodonState
from megalodon.inference import StaticDecoder

BACKENDS = [
    pytest.param("blocked", "cpu"),
    pytest.param("triton", "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted here")),
    pytest.param(
        "triton", "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]


def started(model, lengths: list[int]) -> MegalodonState:
    """A state whose rows have read different numbers of tokens."""
    states = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (1, length), device=model.device)
        states.append(model(ids, use_cache=True).past_key_values)
    return MegalodonState.concatenate(states)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@torch.no_grad()
def test_equals_the_model(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton") if backend == "triton" else None
    monkeypatch.setenv("MEGALODON_BACKEND", backend)
    model = tiny_model(num_layers=1, norm_prior_count=2).to(device).eval()
    state = started(model, [6, 0, 11])
    decoder = StaticDecoder(model, state)
    for _ in range(4):  # the first row crosses its chunk's end
        ids = torch.randint(0, VOCABULARY, (3,), device=device)
        out = model(ids[:, None], past_key_values=state, use_cache=True)
        state = out.past_key_values
        assert relative(decoder.step(ids), out.logits[:, 0]) < 1e-5
    for row in range(3):  # alone, since what stands behind a row's open chunk is not defined
        assert state_difference(decoder.state[row], state[row]) < 1e-5


@pytest.mark.parametrize("backend", ["blocked", pytest.param("triton", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_layers_are_one_graph_and_few_places_are_enough(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton") if backend == "triton" else None
    monkeypatch.setenv("MEGALODON_BACKEND", backend)
    made: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiling(f, backend=count, **options))
    torch.compiler.reset()
    model = tiny_model(num_layers=2).eval()
    state = started(model, [1, 9])
    decoder = StaticDecoder(model, state, tokens=3, compiled=backend == "triton")
    for _ in range(3):
        ids = torch.randint(0, VOCABULARY, (2,))
        out = model(ids[:, None], past_key_values=state, use_cache=True)
        state = out.past_key_values
        assert relative(decoder.step(ids), out.logits[:, 0]) < 1e-5
    assert len(made) == (backend == "triton")
    assert decoder.state.layers[0].chunk.keys.shape[1] <= 4 < model.config.chunk_size
    with pytest.raises(ValueError, match="all tokens that the decoder was made for"):
        decoder.step(ids)


@torch.no_grad()
def test_its_state_goes_on_in_the_model() -> None:
    model = tiny_model(num_layers=1).eval()
    ids = torch.randint(0, VOCABULARY, (1, 20))
    decoder = StaticDecoder(model, model(ids[:, :3], use_cache=True).past_key_values)
    for token in ids[:, 3:12].unbind(1):
        decoder.step(token)
    rest = model(ids[:, 12:], past_key_values=decoder.state).logits
    assert relative(rest, model(ids).logits[:, 12:]) < 1e-5


def test_bad_input_names_the_argument() -> None:
    model = tiny_model(num_layers=1)
    state = started(model.eval(), [2])
    with pytest.raises(ValueError, match="tokens has shape"):
        StaticDecoder(model, state).step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens=0"):
        StaticDecoder(model, state, tokens=0)
    with pytest.raises(ValueError, match="training mode"):
        StaticDecoder(model.train(), state)
    with pytest.raises(ValueError, match="another model"):
        StaticDecoder(tiny_model(num_layers=1, chunk_size=16).eval(), state)
