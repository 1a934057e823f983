"""Decoding in slots: equal to the model, and each row to the bit independent of slot, neighbours and bucket."""

from __future__ import annotations

import pytest
import torch

from engine_cases import CHUNK, make_model
from megalodon.inference.slots import SlotDecoder, choose_buckets, slot_decoder
from megalodon.models.layers.projection import Projection

TOKENS = torch.randint(1, 256, (1, 4 * CHUNK + 5), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def state_after(model, length: int):
    return model(TOKENS[:, :length], use_cache=True).past_key_values


def decode(decoder: SlotDecoder, slot: int, start: int, length: int, others: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits [length, V] of one slot while others decode something else."""
    active = sorted((slot, *others))
    rows = []
    for i in range(length):
        tokens = [int(TOKENS[0, start + i]) if one == slot else (7 * i + one) % 256 for one in active]
        rows.append(decoder.step(tokens, active)[active.index(slot)])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [{}, {"swiglu": True, "rescale_nffn": True, "scale_emb": True}, {"norm_prior_count": 3}, {"norm_affine": False}],
)
@pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_decoding_equals_the_model(changes: dict[str, object], start: int) -> None:
    model = make_model(torch.float64, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    decoder = slot_decoder(model, 16)
    decoder.load(5, state_after(model, start))
    with torch.inference_mode():
        whole = model(TOKENS).logits[0, start : start + 20]
    torch.testing.assert_close(decode(decoder, 5, start, 20), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_slot_neighbours_or_bucket(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    state = state_after(model, 11)
    alone = slot_decoder(model, 16, choose_buckets(model, (16, 64)))
    alone.load(0, state)
    expected = decode(alone, 0, 11, 24)
    crowded = slot_decoder(model, 64, choose_buckets(model, (16, 64)))
    others = (3, 9, 40, 63)
    for i, slot in enumerate(others):
        crowded.load(slot, state_after(model, 4 * i))
    crowded.load(17, state)
    assert torch.equal(decode(crowded, 17, 11, 24, others), expected)
    mine, theirs = alone.read(0).state_dict(), crowded.read(17).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_moved_sequence_goes_on() -> None:
    model = make_model()
    decoder = slot_decoder(model, 16)
    decoder.load(0, state_after(model, 11))
    expected = decode(decoder, 0, 11, 12)
    decoder.load(9, state_after(model, 11))
    first = decode(decoder, 9, 11, 5)
    decoder.move(9, 2)
    assert torch.equal(torch.cat([first, decode(decoder, 2, 16, 7)]), expected)


def test_what_was_read_from_a_slot_can_be_loaded_and_run_by_the_model() -> None:
    model = make_model()
    decoder = slot_decoder(model, 16)
    decoder.load(3, state_after(model, 7))
    decode(decoder, 3, 7, 15)
    with torch.inference_mode():
        continued = model(TOKENS[:, 22:30], past_key_values=decoder.read(3)).logits
        whole = model(TOKENS[:, :30]).logits[:, 22:]
    torch.testing.assert_close(continued, whole, rtol=1e-4, atol=1e-4)


def test_a_slot_keeps_nothing_of_its_last_sequence() -> None:
    model = make_model()
    decoder = slot_decoder(model, 16)
    decoder.load(0, state_after(model, 0))
    expected = decode(decoder, 0, 0, 20)
    decode(decoder, 0, 20, 20)
    decoder.load(0, state_after(model, 0))
    assert torch.equal(decode(decoder, 0, 0, 20), expected)


def test_buckets_that_give_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    model = make_model()
    assert choose_buckets(model, (16, 32)) == (16, 32)
    product = Projection.__call__

    def uneven(self, x):
        return [y * (1 + 1e-6 * (len(x) == 16)) for y in product(self, x)]

    monkeypatch.setattr(Projection, "__call__", uneven)
    assert choose_buckets(model, (16, 32, 64)) == (32, 64)

    def by_place(self, x):
        return [y + 1e-6 * torch.arange(len(x))[:, None] for y in product(self, x)]

    monkeypatch.setattr(Projection, "__call__", by_place)
    with pytest.raises(RuntimeError, match="another place"):
        choose_buckets(model, (16, 32))


def test_slots_out_of_range() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        slot_decoder(make_model(), 0)
    with pytest.raises(ValueError, match="slots is 1000"):
        slot_decoder(make_model(), 1000)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "widths",
    [{"value_dim": 600, "z_dim": 200, "ffn_hidden_dim": 600}, {"value_dim": 704, "z_dim": 1024, "swiglu": True}],
)
def test_bits_do_not_depend_on_where_work_is_cut_for_threads(threads: int, widths: dict[str, object]) -> None:
    """Wide enough that element-wise work is cut, into parts that end inside a row and inside a vector of numbers."""
    model = make_model(model_dim=200, cema_ndim=8, norm_num_groups=10, **widths)
    state, before = state_after(model, 5), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = slot_decoder(model, 64, (64,))
        for slot in range(64):
            decoder.load(slot, state)
        for i in range(3):
            logits = decoder.step([int(TOKENS[0, 5 + i])] * 64, range(64))
            assert torch.equal(logits, logits[:1].expand_as(logits))
        after = [decoder.read(slot).state_dict() for slot in range(64)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other[name], after[0][name]) for other in after for name in other)
