"""The whole model through the Triton kernels, interpreted: golden vectors, checkpointing, autocast, torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_cases import gradient_difference, gradients, relative, tiny_model, tokens
from test_golden import OWN, check_full, check_stream

pytest.importorskip("triton", reason="Triton runs on Linux only")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted, here")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "triton")


def test_logits_and_gradients() -> None:
    check_full(OWN / "full_swiglu_tied.safetensors")


@pytest.mark.slow
def test_stream() -> None:
    check_stream(OWN / "stream_swiglu_tied.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_base", "full_short"])
def test_logits_and_gradients_of_the_other_vectors(name: str, shared: Path) -> None:
    check_full(shared / "golden" / f"{name}.safetensors")


@pytest.mark.slow
def test_stream_of_the_other_vectors(shared: Path) -> None:
    check_stream(shared / "golden" / "stream_base.safetensors")


@pytest.mark.slow
def test_checkpointing_changes_nothing() -> None:
    model = tiny_model(num_layers=1).train()
    ids = tokens(1, 11)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert gradient_difference(gradients(model), expected) < 5e-6


def test_packed_documents_and_autocast_agree_with_the_blocked_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_layers=1).train()
    ids, documents = tokens(1, 21), torch.tensor([[0] * 9 + [1] * 12])

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, labels=ids, segment_ids=documents, use_cache=False)
        out.loss.backward()
        return out.logits, gradients(model)

    logits, found = run()
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    expected_logits, expected = run()
    assert relative(logits, expected_logits) < 3e-2
    assert gradient_difference(found, expected) < 6e-2


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_model_is_one_graph(checkpointing: bool) -> None:
    model = tiny_model(num_layers=1).train()
    ids = tokens(1, 9)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(ids, labels=ids, return_logits=False).loss.backward()
    assert gradient_difference(gradients(model), expected) < 5e-6


def test_reading_a_prompt_is_one_graph() -> None:
    model = tiny_model(num_layers=1).eval()
    ids = tokens(2, 21)
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(ids)
        expected = model(ids)
        assert relative(found.logits, expected.logits) < 1e-5
        following = [model(ids[:, :3], cache=out.cache).logits for out in (found, expected)]
        assert relative(*following) < 1e-5


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.slow), "blocked"])
def test_blocks_are_compiled_once_for_all_packings(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", backend)
    model, plain = (tiny_model(num_layers=1).train() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    made: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        made.append(len(graph.graph.nodes))
        return graph

    torch.compiler.reset()
    model.model.layers[0].compile(backend=count)
    ids, after_the_first = tokens(1, 12), 0
    for step, borders in enumerate(((9,), (4, 8), (1, 2, 3, 11))):
        documents = torch.zeros(1, 12, dtype=torch.int64)
        for border in borders:
            documents[:, border:] += 1
        losses = [m(ids, labels=ids, segment_ids=documents, use_cache=False).loss for m in (model, plain)]
        losses[0].backward()
        assert relative(*losses) < 1e-5
        after_the_first = after_the_first or len(made)
        assert len(made) == after_the_first, f"compiled again at step {step}"


@pytest.mark.slow
def test_streams_of_chunks_are_one_graph() -> None:
    model, plain = (tiny_model(num_layers=1).train() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    torch.compiler.reset()
    model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
    states = [None, None]
    for _ in range(3):
        ids = tokens(1, model.config.chunk_size)
        runs = zip((model, plain), states, strict=True)
        found, expected = (m(ids, labels=ids, cache=state, use_cache=True) for m, state in runs)
        assert relative(found.loss, expected.loss) < 1e-5
        states = [found.cache.detach(), expected.cache.detach()]
