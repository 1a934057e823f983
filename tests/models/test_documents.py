"""Documents told by any library's names: isolated as by `segment_ids`, in agreement, or refused; no keyword unheard."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from model_cases import gradient_difference, gradients, relative, state_difference, tiny_model, tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening

from megalodon.models.keywords import NEUTRAL, UnknownKeyword
from megalodon.models.output import CACHE

MODEL = tiny_model().eval()
SIZES = [13, 1, 8, 22]
LENGTH = sum(SIZES)
BOUNDS = torch.tensor([0, *SIZES]).cumsum(0)
NUMBERS = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))[None]
PLACES = torch.cat([torch.arange(size) for size in SIZES])[None]
COUNTING = torch.arange(LENGTH)[None]

WAYS: dict[str, dict[str, Any]] = {
    "segment_ids": {"segment_ids": NUMBERS},
    "position_ids": {"position_ids": PLACES},
    "positions from 2": {"position_ids": PLACES + 2},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "cu_seq_lens": {"cu_seq_lens_q": BOUNDS.int(), "cu_seq_lens_k": BOUNDS.int()},
    "with lengths": {"cu_seq_lens_q": BOUNDS, "max_length_q": max(SIZES), "max_length_k": torch.tensor(max(SIZES))},
    "all": {"seq_idx": NUMBERS, "position_ids": PLACES, "cu_seq_lens_q": BOUNDS, "max_length_q": 64},
    "counting on": {"segment_ids": NUMBERS, "position_ids": COUNTING},
    "lists": {"segment_ids": NUMBERS.tolist(), "cu_seq_lens_k": BOUNDS.tolist()},
    "small numbers": {"segment_ids": NUMBERS.to(torch.uint8) ^ 255, "position_ids": PLACES.to(torch.int16)},
    "empty documents": {"cu_seq_lens_q": torch.tensor([0, 0, *BOUNDS[1:3], *BOUNDS[2:], LENGTH]).int()},
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_name_isolates(way: str, use_cache: bool) -> None:
    x = tokens(1, LENGTH)
    packed = MODEL(x, use_cache=use_cache, **WAYS[way])
    for begin, end in pairwise(BOUNDS):
        # either way is within 1e-6 of float64
        assert relative(packed.logits[:, begin:end], MODEL(x[:, begin:end]).logits) < 2e-6
    if use_cache:
        alone = MODEL(x[:, BOUNDS[-2] :], use_cache=True).past_key_values
        assert state_difference(packed.past_key_values, alone) < 1e-5
    assert relative(MODEL.model(x, **WAYS[way])[0], MODEL.model(x, segment_ids=NUMBERS)[0]) < 1e-6


@pytest.mark.parametrize("way", [way for way in WAYS if way != "segment_ids"])
def test_every_name_gives_the_gradients_of_segment_ids(way: str) -> None:
    model, x = tiny_model().train(), tokens(1, LENGTH)
    model(x, labels=x, segment_ids=NUMBERS).loss.backward()
    expected = gradients(model)
    model(x, labels=x, return_logits=False, **WAYS[way]).loss.backward()
    assert gradient_difference(gradients(model), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_labels_never_ask_how_another_document_begins(way: str, return_logits: bool) -> None:
    x = tokens(1, LENGTH)
    losses = [MODEL(x[:, a:b], labels=x[:, a:b], num_items_in_batch=LENGTH - 4).loss for a, b in pairwise(BOUNDS)]
    loss = MODEL(x, labels=x, return_logits=return_logits, **WAYS[way]).loss
    assert loss == pytest.approx(float(sum(losses)), rel=1e-6)
    shifted = torch.cat([x[:, 1:], x[:, :1]], dim=1)  # what is shifted already is the caller's own
    assert MODEL(x, shift_labels=shifted, **WAYS[way]).loss != pytest.approx(float(loss), rel=1e-4)


@torch.no_grad()
def test_positions_of_one_row_hold_for_all_and_rows_may_differ() -> None:
    x = tokens(3, LENGTH)
    expected = MODEL(x, segment_ids=NUMBERS.expand(3, -1)).logits
    assert relative(MODEL(x, position_ids=PLACES).logits, expected) < 1e-6
    mixed = torch.cat([PLACES, COUNTING + 5, PLACES])
    whole = MODEL(x[1:2]).logits
    assert relative(MODEL(x, position_ids=mixed).logits, torch.cat([expected[:1], whole, expected[2:]])) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("padded_with", [0, 1])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_positions_that_count_on_over_padding_change_nothing(side: str, padded_with: int) -> None:
    x, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, {"left": slice(6), "right": slice(14, 20), "inside": slice(7, 11)}[side]] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padded_with)
    expected = MODEL(x, attention_mask=mask, use_cache=True)
    for told in (positions, COUNTING[:, :20], COUNTING[:, :20] + 3):
        out = MODEL(x, attention_mask=mask, position_ids=told, use_cache=True)
        assert torch.equal(out.logits, expected.logits)
        assert state_difference(out.past_key_values, expected.past_key_values) == 0


@torch.no_grad()
def test_padding_and_restarting_positions_together() -> None:
    x, mask = tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[0, :4], mask[0, 11:13] = 0, 0
    positions = torch.tensor([[1] * 4 + [0, 1, 2, 3, 4] + [0, 1] + [1, 1] + [2, 3, 0, 1, 2, 3, 4]])
    out = MODEL(x, attention_mask=mask, position_ids=positions).logits
    second = torch.cat([x[:, 9:11], x[:, 13:15]], dim=1)
    assert relative(out[:, 4:9], MODEL(x[:, 4:9]).logits) < 1e-6
    assert relative(out[:, [9, 10, 13, 14]], MODEL(second).logits) < 1e-6
    assert relative(out[:, 15:], MODEL(x[:, 15:]).logits) < 1e-6


@torch.no_grad()
def test_positions_with_a_carried_state_count_on_or_begin_afresh() -> None:
    x = tokens(2, 24)
    state = MODEL(x[:, :10], use_cache=True).past_key_values
    on = MODEL(x[:, 10:], past_key_values=state).logits
    for offset in (10, 11, 500):
        told = torch.arange(offset, offset + 14)[None]
        assert torch.equal(MODEL(x[:, 10:], past_key_values=state, position_ids=told).logits, on)
    afresh = MODEL(x[:, 10:], past_key_values=state, position_ids=torch.arange(14)[None], use_cache=True)
    alone = MODEL(x[:, 10:], use_cache=True)
    assert relative(afresh.logits, alone.logits) < 1e-6
    assert state_difference(afresh.past_key_values, alone.past_key_values) < 1e-6
    one = MODEL(x[:, 10:11], past_key_values=state, position_ids=torch.tensor([[10], [0]])).logits
    assert relative(one[0], on[0, :1]) < 1e-5 and relative(one[1], alone.logits[1, :1]) < 1e-5
    with pytest.raises(ValueError, match="position_ids starts at 4 in row 0, whose state has read 10 tokens"):
        MODEL(x[:, 10:], past_key_values=state, position_ids=torch.arange(4, 18)[None])
    keys = torch.tensor([0, 16, 24])  # as attention sees it: the first document has ten tokens more
    out = MODEL(x[:1, 10:], past_key_values=state[0], cu_seq_lens_q=torch.tensor([0, 6, 14]), cu_seq_lens_k=keys)
    assert relative(out.logits[:, :6], on[:1, :6]) < 1e-6
    assert relative(out.logits[:, 6:], MODEL(x[:1, 16:]).logits) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"return_position_ids": False}], ids=["positions", "no positions"])
def test_what_the_flattening_collator_gives(options: dict[str, bool]) -> None:
    texts = [tokens(1, size)[0] for size in SIZES]
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True, **options)
    batch = collate([{"input_ids": text.tolist()} for text in texts])
    out = MODEL(**batch)
    losses = [torch.nn.functional.cross_entropy(MODEL(t[None]).logits[0, :-1], t[1:], reduction="sum") for t in texts]
    assert relative(out.loss, torch.stack(losses).sum() / (LENGTH - len(SIZES))) < 1e-6


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "seq_idx": ({"position_ids": PLACES, "seq_idx": COUNTING // 9}, "position_ids contradicts seq_idx"),
    "one document": ({"segment_ids": NUMBERS * 0, "position_ids": PLACES}, "position_ids contradicts segment_ids"),
    "segments": ({"segment_ids": NUMBERS, "seq_idx": NUMBERS // 2}, "seq_idx contradicts segment_ids"),
    "bounds": ({"cu_seq_lens_q": [0, 20, LENGTH], "position_ids": PLACES}, "position_ids contradicts cu_seq_lens_q"),
    "keys": ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": [0, 5, 6, 7, LENGTH]}, "contradicts cu_seq_lens_q"),
    "short": ({"cu_seq_lens_q": [0, 20]}, "ascends from 0 to the number of tokens, 44"),
    "descending": ({"cu_seq_lens_k": [0, 30, 20, LENGTH]}, "cu_seq_lens_k is .*ascends"),
    "length": ({"seq_idx": NUMBERS, "max_length_k": 21}, "max_length_k=21 is less.* by seq_idx, one has 22"),
    "length alone": ({"max_length_q": 22}, "max_length_q=22 .*no argument says where documents begin"),
    "jump": ({"position_ids": COUNTING * 2}, "position_ids jumps from 0 to 2 at row 0, column 1"),
    "shape": ({"position_ids": COUNTING[:, :9]}, r"position_ids has shape \(1, 9\): it must be \(1, 44\)"),
    "dtype": ({"seq_idx": NUMBERS.float()}, "seq_idx is torch.float32: it must be of integers"),
    "numbers in the mask": ({"attention_mask": NUMBERS + 1}, "documents are told by segment_ids"),
    "a list as the mask": ({"attention_mask": [[1] * LENGTH]}, "attention_mask is a list: it must be a tensor"),
    "masks by name": ({"attention_mask": {"full": None}, "position_ids": PLACES}, "attention_mask is a dict: it must"),
    "scores in the mask": ({"attention_mask": torch.full((1, LENGTH), -1e9)}, "attention_mask has values other than 0"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case: str) -> None:
    told, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        MODEL(tokens(1, LENGTH), **told)


def test_bounds_are_for_one_row() -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_q describes a flattened batch of one row: input_ids has 2"):
        MODEL(tokens(2, LENGTH), cu_seq_lens_q=BOUNDS)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prefill_chunk_size": 22}, {"prefill_chunk_size": 9}, {"num_beams": 2}]
)
@pytest.mark.parametrize("way", ["segment_ids", "positions from 2", "seq_idx", "cu_seq_lens", "all"])
def test_generation_goes_on_with_the_last_document(way: str, options: dict[str, Any]) -> None:
    x = tokens(1, LENGTH)
    options = {**options, "max_new_tokens": 9, "do_sample": False}
    expected = MODEL.generate(x[:, BOUNDS[-2] :], **options)[:, SIZES[-1] :]
    assert torch.equal(MODEL.generate(x, **WAYS[way], **options)[:, LENGTH:], expected)


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new part"])
def test_generation_goes_on_from_a_state_of_packed_text(whole: bool) -> None:
    x, at = tokens(1, LENGTH), int(BOUNDS[-2]) + 4
    state = MODEL(x[:, :at], position_ids=PLACES[:, :at], use_cache=True).past_key_values
    expected = MODEL.generate(x[:, BOUNDS[-2] :], max_new_tokens=9, do_sample=False)[:, SIZES[-1] :]
    part = slice(None) if whole else slice(at, None)
    for told in ({"position_ids": PLACES[:, part]}, {"segment_ids": NUMBERS[:, part]}):
        given = {"attention_mask": torch.ones_like(x), CACHE: state, "max_new_tokens": 9}
        out = MODEL.generate(x[:, part], do_sample=False, **given, **told)
        assert torch.equal(out[:, -9:], expected)


# --- keywords -------------------------------------------------------------------------------------------------------


def changing(value: Any) -> Tensor | bool:
    return torch.ones(1, 6, dtype=torch.long) if isinstance(value, Tensor) else not value


@pytest.mark.parametrize("part", ["model", "head"])
def test_unknown_keywords_are_refused_by_name(part: str) -> None:
    run = MODEL if part == "head" else MODEL.model
    for name, near in (("sequence_idx", ""), ("segment_id", "did you mean segment_ids"), ("pixel_values", "")):
        for kind in (TypeError, ValueError):
            with pytest.raises(kind, match=f"{name}: it would change nothing.*{near}"):
                run(tokens(1, 6), **{name: None})
    with pytest.raises(UnknownKeyword, match="head_mask"):
        run(tokens(1, 6), head_mask=torch.ones(2, 2))


def test_neutral_keywords_change_nothing_and_have_their_reasons() -> None:
    x = tokens(1, 6)
    expected = MODEL(x).logits
    neutral: dict[str, Any] = {
        "output_attentions": False,
        "output_router_logits": False,
        "is_causal": True,
        "num_items_in_batch": 7,
        "cache_position": torch.arange(6),
        "token_type_ids": torch.zeros(1, 6, dtype=torch.long),
        "mm_token_type_ids": torch.zeros(1, 6, dtype=torch.long),
    }
    assert neutral.keys() == NEUTRAL.keys() and all(entry.reason for entry in NEUTRAL.values())
    assert torch.equal(MODEL(x, **neutral).logits, expected)
    assert torch.equal(MODEL(x, **dict.fromkeys(neutral)).logits, expected)
    for name in neutral.keys() - {"cache_position", "num_items_in_batch"}:
        with pytest.raises(ValueError, match=name):
            MODEL(x, **{name: changing(neutral[name])})
    with pytest.raises(ValueError, match="output_hidden_states=True or register a forward hook"):
        MODEL(x, output_attentions=True)
