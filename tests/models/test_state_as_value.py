"""A state is a value: for threads, for optimisers, for memory, for copies and files."""

from __future__ import annotations

import copy
import io
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from model_cases import VOCABULARY, relative, state_difference, tiny_model, tokens
from torch import Tensor

from megalodon import MegalodonState, ops
from megalodon.models.output import CACHE

MODEL = tiny_model().eval()


@torch.no_grad()
def read(x: Tensor, state: MegalodonState | None = None, **given: Tensor) -> MegalodonState:
    return MODEL(x, past_key_values=state, use_cache=True, **given).past_key_values


@torch.no_grad()
def one_by_one(state: MegalodonState, text: Tensor) -> tuple[Tensor, MegalodonState]:
    logits = []
    for token in text.split(1, dim=1):
        output = MODEL(token, past_key_values=state, use_cache=True)
        state = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), state


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3])
def test_threads_may_go_on_from_one_state(piece: int) -> None:
    texts = [tokens(1, piece) for _ in range(4)]
    before = read(tokens(1, 3))
    token = tokens(1, 1)
    expected = [MODEL(text, past_key_values=read(token, before)).logits for text in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        for _ in range(40):
            state, found, barrier = read(token, before), [torch.empty(0)] * 4, threading.Barrier(4)

            def go_on(i: int, state=state, found=found, barrier=barrier) -> None:
                barrier.wait()
                found[i] = one_by_one(state, texts[i])[0] if piece == 1 else MODEL(texts[i], cache=state).logits

            threads = [threading.Thread(target=go_on, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5
    finally:
        sys.setswitchinterval(interval)


def test_one_holder_appends_in_place_and_the_others_copy() -> None:
    state = read(tokens(1, 3))
    shared = state.layers[0].chunk.keys.data_ptr()
    assert state.layers[0].chunk.keys.shape[1] > 3, "there is room for the next token"
    first, second = (read(tokens(1, 1), given).layers[0].chunk.keys.data_ptr() for given in (state.detach(), state))
    assert first == shared != second


# --- optimisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("length", [1, 5, 32, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_complex_inputs_are_resolved(backend: str, length: int, packed: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return (0.5 * torch.randn(*shape, dtype=torch.complex64)).requires_grad_()

    q, gamma, state = leaf(6, 4), leaf(6, 4), leaf(2, 6, 4)
    documents = (torch.arange(length) >= length // 2).long().expand(2, -1) if packed else None
    y, h = ops.cema(torch.randn(2, length, 6), torch.rand(6, 4), q, gamma, None, state, documents, backend=backend)
    (y.sum() + torch.view_as_real(h).square().sum()).backward()
    leaves = [value for value in (q, gamma, state) if value.grad is not None]
    assert len(leaves) == 3 and not any(value.grad.is_conj() for value in leaves)
    assert torch.nn.utils.clip_grad_norm_(leaves, 1.0).isfinite()
    before = [value.detach().clone() for value in leaves]
    torch.optim.AdamW(leaves, lr=0.1).step()
    assert not any(torch.equal(value, old) for value, old in zip(leaves, before, strict=True) if value.grad.abs().sum())


@pytest.mark.parametrize("length", [1, 6, 40])
def test_a_learned_state_is_optimised(length: int) -> None:
    state, x = read(tokens(2, 5)), tokens(2, length)
    learned = [layer.cema.detach().clone().requires_grad_() for layer in state.layers]
    layers = [layer._replace(cema=h) for layer, h in zip(state.layers, learned, strict=True)]
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        mine = MegalodonState(layers, state.final, state.position, state.dimensions)
        out = MODEL(x, past_key_values=mine, shift_labels=x)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0]


def test_a_state_of_conjugated_tensors_is_like_any_other(tmp_path) -> None:
    state, x = read(tokens(2, 5)), tokens(2, 3)
    layers = [layer._replace(cema=layer.cema.conj_physical().conj()) for layer in state.layers]
    lazy = MegalodonState(layers, state.final, state.position, state.dimensions)
    assert repr(lazy) == repr(state) and lazy.nbytes == state.nbytes
    lazy.save(tmp_path / "lazy.safetensors")
    assert state_difference(MegalodonState.load(tmp_path / "lazy.safetensors"), state) == 0
    assert torch.equal(one_by_one(lazy, x)[0], one_by_one(state, x)[0])
    assert state_difference(one_by_one(lazy, x)[1], one_by_one(state, x)[1]) == 0


# --- memory ---------------------------------------------------------------------------------------------------------


def live_bytes(state: MegalodonState) -> int:
    """Bytes of all memory that the state keeps alive, buffers' unused ends included."""
    tensors = [state.position, *state.final]
    for layer in state.layers:
        tensors += [*layer.moments, layer.cema, *layer.chunk]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def padded_batch() -> MegalodonState:
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[0, :21], mask[1, 44:] = 0, 0
    return read(tokens(3, 50), attention_mask=mask)


def packed_batch() -> MegalodonState:
    return read(tokens(2, 90), segment_ids=(torch.arange(90) >= torch.tensor([[33], [61]])).long())


def generated() -> MegalodonState:
    given = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    return MODEL.generate(tokens(2, 30), **given)[CACHE]


@torch.no_grad()
def in_pieces() -> MegalodonState:
    state = None
    for size in (3, 1, 1, 2, 3000, 4, 1):
        state = MODEL(tokens(1, size), past_key_values=state, use_cache=True).past_key_values
    return state


STATES: dict[str, Callable[[], MegalodonState]] = {
    **{f"{length} tokens": lambda length=length: read(tokens(1, length)) for length in (1, 7, 8, 2000, 8005)},
    **{f"{n} single tokens": lambda n=n: one_by_one(read(tokens(2, 3)), tokens(2, n))[1] for n in (1, 4, 5, 13)},
    "padded": padded_batch,
    "packed": packed_batch,
    "generated": generated,
    "in pieces": in_pieces,
    "rows": lambda: padded_batch()[[1, 0]],
    "joined": lambda: MegalodonState.concatenate([read(tokens(1, 7)), read(tokens(2, 11))]),
    "reset": lambda: read(tokens(2, 45)).reset(torch.tensor([True, False])),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_keeps_no_more_alive_than_it_says(name: str) -> None:
    state = STATES[name]()
    assert live_bytes(state) <= 1.2 * state.nbytes
    copied = copy.deepcopy(state)
    assert state_difference(copied, state) == 0 and live_bytes(copied) <= 1.2 * state.nbytes
    file = io.BytesIO()
    torch.save(state, file)
    names = 600 * (5 * len(state.layers) + 3)  # what a file says of each tensor
    assert file.tell() < 1.2 * state.nbytes + names
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert state_difference(loaded, state) == 0
    x = tokens(state.batch_size, 12)
    for other in (copied, loaded):
        assert relative(one_by_one(other, x)[0], one_by_one(state, x)[0]) < 1e-6


def test_memory_does_not_grow_with_the_text() -> None:
    sizes = {live_bytes(read(tokens(1, length))) for length in (403, 2003, 8003)}
    assert len(sizes) == 1


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(dtype=torch.bfloat16, device="cpu"),
        lambda m: m.bfloat16(),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.double().bfloat16(),
        lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    ],
)
def test_casting_keeps_the_recurrence_in_float32(cast: Callable, tmp_path) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    kept = {name: value.clone() for name, value in model.named_parameters() if ".cema." in name}
    cast(model)
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if name in kept else torch.bfloat16)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in kept.items())
    x = torch.randint(0, VOCABULARY, (1, 20))
    assert torch.equal(model(x).logits, loaded(x).logits)


def test_blocks_cast_alone_and_doubles_are_doubles() -> None:
    model = tiny_model()
    assert model.double().model.layers[0].cema.alpha.dtype == torch.float64
    assert model.float().model.layers[0].cema.alpha.dtype == torch.float32
    assert model.model.layers[0].bfloat16().cema.alpha.dtype == torch.float32
    assert model.to("meta").model.layers[0].cema.alpha.device.type == "meta"
