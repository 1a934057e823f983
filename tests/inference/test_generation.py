"""Generation: a prompt in any pieces, one token at a time, resumed as if it had never stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer
from megalodon.inference import REPETITION_WINDOW, Sampling, Session, generate_stream, generate_text
from megalodon.inference.generation import default_piece_length


@pytest.fixture
def model() -> MegalodonForCausalLM:
    config = MegalodonConfig(
        **{"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32},
        **{"vocab_size": 256, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4},
    )
    return MegalodonForCausalLM(config).eval()


PROMPT = list(b"It is a truth universally acknowledged, that a single man in possession of a good fortune")


def test_greedy_equals_whole_sequence_forward(model: MegalodonForCausalLM) -> None:
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(24):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert list(generate_stream(model, PROMPT, 24, Sampling(temperature=0))) == tokens[len(PROMPT) :]


@pytest.mark.parametrize("size", [1, 5, 16, 1000])
def test_prompt_pieces_do_not_matter(model: MegalodonForCausalLM, size: int) -> None:
    whole = list(generate_stream(model, np.array(PROMPT), 12, Sampling(), seed=3))
    pieces = (PROMPT[start : start + size] for start in range(0, len(PROMPT), size))
    assert list(generate_stream(model, pieces, 12, Sampling(), seed=3)) == whole


def test_prompt_is_read_in_bounded_pieces_that_end_at_multiples(model: MegalodonForCausalLM) -> None:
    session = Session(model, piece_length=32)
    read: list[int] = []
    session.read((PROMPT[:40], PROMPT[40:]), read.append)
    assert read == [32, 32, len(PROMPT) - 64 - 1] and session.tokens == len(PROMPT)
    list(session.generate(4))
    after = session.tokens
    session.read(PROMPT, read.append)
    assert read[3:] == [32 - (after - 1) % 32, 32, 32, (after + len(PROMPT) - 1) % 32]
    assert session.tokens == after + len(PROMPT) and session.context.state.position.tolist() == [session.tokens - 1]


def test_default_pieces_are_multiples_of_the_chunk() -> None:
    assert [default_piece_length(size) for size in (16, 1000, 2048, 4096)] == [2048, 3000, 2048, 4096]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(0.8, 50, 0.95, 0.01, 1.3)])
def test_going_on_from_a_context_equals_never_stopping(model: MegalodonForCausalLM, sampling: Sampling) -> None:
    session = Session(model, seed=5)
    session.read(PROMPT)
    whole = list(session.generate(40, sampling))
    first = Session(model, seed=5)
    first.read(PROMPT)
    beginning = list(first.generate(17, sampling))
    context = first.context
    for _ in range(2):  # a context can be used again
        assert beginning + list(Session(model, context).generate(23, sampling)) == whole
    again = Session(model, context)
    list(again.generate(23, sampling))
    mine, theirs = again.context.state.state_dict(), session.context.state.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_seed_overrides_that_of_the_context(model: MegalodonForCausalLM) -> None:
    session = Session(model, seed=5)
    session.read(PROMPT)
    context = session.context
    own, same, other = (list(Session(model, context, seed).generate(30)) for seed in (None, 5, 6))
    assert own == same != other


def test_context_of_a_prompt_of_one_token(model: MegalodonForCausalLM) -> None:
    session = Session(model, seed=1)
    session.read([65])
    assert session.context.state.position.tolist() == [0]
    assert list(Session(model, session.context).generate(9)) == list(generate_stream(model, [65], 9, seed=1))


def test_repetition_window_is_bounded_and_reaches_back(model: MegalodonForCausalLM) -> None:
    session = Session(model)
    session.read([7] + [9] * (REPETITION_WINDOW - 1))
    assert session.recent[0] == 7
    session.read([9])
    assert session.recent == [9] * REPETITION_WINDOW


def test_stop_tokens_end_generation(model: MegalodonForCausalLM) -> None:
    tokens = list(generate_stream(model, PROMPT, 30, Sampling(), seed=3))
    stop = tokens[7]
    shortened = list(generate_stream(model, PROMPT, 30, Sampling(), seed=3, stop_tokens=[stop]))
    assert shortened == tokens[: tokens.index(stop) + 1]


def test_only_ids_of_the_tokenizer_are_generated(model: MegalodonForCausalLM) -> None:
    session = Session(model, vocab_size=4, seed=0)
    session.read(PROMPT)
    assert set(session.generate(40)) <= {0, 1, 2, 3}


def test_text_cuts_no_character_and_resumes_within_one(model: MegalodonForCausalLM) -> None:
    tokenizer = ByteTokenizer()
    whole = Session(model, seed=2)
    whole.read(PROMPT)
    expected = "".join(generate_text(whole, tokenizer, 60))
    for length in range(20, 30):
        first = Session(model, seed=2)
        first.read(PROMPT)
        text = "".join(generate_text(first, tokenizer, length, resumable=True))
        text += "".join(generate_text(Session(model, first.context), tokenizer, 60 - length))
        assert text == expected


def test_stop_string_ends_the_text(model: MegalodonForCausalLM) -> None:
    tokenizer = ByteTokenizer()

    def text(stop: list[str]) -> str:
        session = Session(model, seed=2)
        session.read(PROMPT)
        return "".join(generate_text(session, tokenizer, 60, stop=stop))

    whole = text([])
    stop = whole[20:22]
    assert text([stop]) == whole[: whole.index(stop)]


def test_empty_prompt_is_refused(model: MegalodonForCausalLM) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate_stream(model, [], 3))
    with pytest.raises(ValueError, match="empty"):
        _ = Session(model).context


def test_ids_that_the_model_does_not_have(model: MegalodonForCausalLM) -> None:
    with pytest.raises(ValueError, match="255"):
        Session(model).read([1, 256, 3])


def test_size_of_the_context_does_not_grow(model: MegalodonForCausalLM) -> None:
    sizes = []
    session = Session(model)
    for _ in range(3):
        session.read([1] * 160)
        sizes.append(session.context.state.nbytes)
    assert len(set(sizes)) == 1
