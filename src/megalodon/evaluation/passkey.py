"""Passkey: a number that stands once in a long text is asked for at its end, of a trained model, in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalodon.data import Tokenizer, check_vocabulary
from megalodon.inference.generation import default_piece_length
from megalodon.models import CausalLM, State

OPENING = "Somewhere in this text stands a pass key. Remember it: it will be asked for at the end.\n"
FILLER = (
    "The river runs past the mill. The road goes over the hill. Rain falls, and the sun comes back. "
    "Somebody walks there and home again. "
)
KEY = "\nThe pass key is {key}. Keep it in mind: {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Keys:
    """Numbers that a tokenizer makes equally many ids of: `sentences` [n, s] and `answers` [n, a], int64."""

    numbers: tuple[str, ...]
    sentences: np.ndarray
    answers: np.ndarray


def draw_keys(tokenizer: Tokenizer, count: int, digits: int, seed: int) -> Keys:
    """`count` different numbers of so many digits, of those whose ids are most often as many.

    Raises:
        ValueError: count is below 2, digits below 1, or there are not so many such numbers.
    """
    if count < 2 or digits < 1:
        raise ValueError(f"trials is {count} and digits {digits}: there must be 2 trials and 1 digit or more")
    generator = np.random.RandomState(seed)
    wanted = min(16 * count, 9 * 10 ** (digits - 1))
    drawn = dict.fromkeys(
        str(generator.randint(1, 10)) + "".join(map(str, generator.randint(0, 10, digits - 1)))
        for _ in range(4 * wanted)
    )
    encoded = {key: (tokenizer.encode(KEY.format(key=key)), tokenizer.encode(f" {key}")) for key in drawn}
    sizes = Counter((len(sentence), len(answer)) for sentence, answer in encoded.values())
    common = sizes.most_common(1)[0][0]
    alike = [key for key, (sentence, answer) in encoded.items() if (len(sentence), len(answer)) == common][:count]
    if len(alike) < count:
        raise ValueError(f"trials: there are not {count} different keys of {digits} digits with equally many tokens")
    return Keys(
        tuple(alike),
        np.stack([encoded[key][0] for key in alike]),
        np.stack([encoded[key][1] for key in alike]),
    )


def evaluate_passkey(
    model: CausalLM,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 8,
    digits: int = 5,
    seed: int = 0,
    filler: Callable[[], Iterable[str]] | None = None,
    piece_length: int | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Ask for a number that stood at some depth of a text of some length. Memory does not depend on the length.

    Args:
        model: in evaluation mode.
        lengths: tokens of the whole text, question included.
        depths: where the number stands in the filling text, from 0 (its beginning) to 1 (its end).
        trials: texts of each length and depth, with a number each; they are read side by side.
        filler: the text around it, in pieces, again and again from its beginning; None: four sentences.
        piece_length: tokens per forward pass; None for the least multiple of the chunk size from 2048 up.
        on_result: told each entry of `results`.

    Returns:
        A dict ready for JSON: `results`, for each length and depth `exact` (the share of trials whose every token was
        the likeliest), `preferred` (the share of the other trials' numbers that are less likely than the right one;
        0.5 for a model that remembers nothing), `nats` of the right number and `nats_of_others` (means); and
        `by_length` with the means over depths.

    Raises:
        ValueError: the tokenizer does not fit the model, a length has no room for number and question, or a depth lies
            outside 0 to 1.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    keys = draw_keys(tokenizer, trials, digits, seed)
    opening, question = tokenizer.encode(OPENING), tokenizer.encode(QUESTION)
    needed = len(opening) + keys.sentences.shape[1] + len(question) + keys.answers.shape[1]
    for length in lengths:
        if length < needed:
            raise ValueError(f"lengths: {length} tokens have no room: the number and its question take {needed}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths: {depth} is not between 0 and 1")
    piece = default_piece_length(model.model.dimensions.alignment) if piece_length is None else piece_length
    if piece < 1:
        raise ValueError(f"piece_length is {piece}; it must be 1 or more")
    results = []
    for length in lengths:
        for depth in depths:
            room = length - needed
            before = round(room * depth)
            around = _endless(tokenizer, filler)
            shared = _joined(opening, _take(around, before))
            state = _read(model, (part[None] for part in _pieces(shared, piece)), None)
            state = state.repeat(trials)
            state = _read(model, iter([keys.sentences]), state)
            rest = (np.repeat(part[None], trials, 0) for part in _pieces(_take(around, room - before), piece))
            state = _read(model, rest, state)
            state = _read(model, iter([np.repeat(question[None, :-1], trials, 0)]), state)
            entry = {"length": length, "depth": depth, **_asked(model, state, int(question[-1]), keys.answers)}
            results.append(entry)
            if on_result is not None:
                on_result(entry)
    measures = ("exact", "preferred", "nats", "nats_of_others")
    by_length = [
        {
            "length": length,
            **{m: float(np.mean([entry[m] for entry in results if entry["length"] == length])) for m in measures},
        }
        for length in dict.fromkeys(lengths)
    ]
    return {"trials": trials, "digits": digits, "seed": seed, "results": results, "by_length": by_length}


def _endless(tokenizer: Tokenizer, filler: Callable[[], Iterable[str]] | None) -> Iterator[np.ndarray]:
    again = (lambda: [FILLER * 64]) if filler is None else filler
    while True:
        empty = True
        for ids in tokenizer.encode_stream(again()):
            empty = empty and not len(ids)
            yield ids
        if empty:
            raise ValueError("filler: it holds no text")


def _take(arrays: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The next `count` ids; what is left of the last array is dropped."""
    while count > 0:
        ids = next(arrays)[:count]
        count -= len(ids)
        yield ids


def _joined(first: np.ndarray, others: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from others


def _pieces(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same ids, `length` at a time."""
    held: list[np.ndarray] = []
    for array in arrays:
        held.append(array)
        if sum(map(len, held)) >= length:
            whole = np.concatenate(held)
            full = len(whole) // length * length
            yield from np.split(whole[:full], range(length, full, length))
            held = [whole[full:]]
    if sum(map(len, held)):
        yield np.concatenate(held)


@torch.inference_mode()
def _read(model: CausalLM, pieces: Iterator[np.ndarray], state: State | None) -> Any:
    """The state after pieces [B, n] of ids."""
    for ids in pieces:
        if ids.shape[1]:
            tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(model.device)
            state = model.model(tokens, past_key_values=state, use_cache=True).past_key_values
    return state


@torch.inference_mode()
def _asked(model: CausalLM, state: State, last: int, answers: np.ndarray) -> dict[str, float]:
    """Every answer [n, a] after every row of the state and the id `last`: what the rows' own are beside the others'."""
    count, own_nats, other_nats, preferred, exact = len(answers), [], [], [], []
    targets = torch.from_numpy(answers).to(model.device)
    ids = torch.cat([torch.full_like(targets[:, :1], last), targets[:, :-1]], 1)
    for row in range(count):
        output = model.model(ids, past_key_values=state[row : row + 1].repeat(count), use_cache=True)
        logits: Tensor = model.lm_head(output.last_hidden_state).float()
        nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1).double().cpu()
        others = torch.cat([nats[:row], nats[row + 1 :]])
        own_nats.append(float(nats[row]))
        other_nats.append(float(others.mean()))
        preferred.append(float((others > nats[row]).double().mean() + (others == nats[row]).double().mean() / 2))
        exact.append(float((logits[row].argmax(-1) == targets[row]).all()))
    return {
        "exact": float(np.mean(exact)),
        "preferred": float(np.mean(preferred)),
        "nats": float(np.mean(own_nats)),
        "nats_of_others": float(np.mean(other_nats)),
    }
