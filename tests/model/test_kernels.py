"""The whole model through the Triton kernels, interpreted: the golden vectors, checkpointing, autocast."""

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


def test_stream() -> None:
    check_stream(OWN / "stream_swiglu_tied.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_base", "full_short"])
def test_logits_and_gradients_of_the_other_vectors(name: str, shared: Path) -> None:
    check_full(shared / "golden" / f"{name}.safetensors")


@pytest.mark.slow
def test_stream_of_the_other_vectors(shared: Path) -> None:
    check_stream(shared / "golden" / "stream_base.safetensors")


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
