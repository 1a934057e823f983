"""What a model's memory is worth: the loss when all of it, or one part of it, is forgotten at regular places.

A text is read again for every cut and every part. What is lost by forgetting after every 1,024 tokens is what the
tokens before those 1,024 are worth; where the loss no longer falls with longer cuts, the memory reaches no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megalodon.choices import CUTS
from megalodon.data import Document, Tokenizer
from megalodon.evaluation.perplexity import Progress, evaluate_perplexity
from megalodon.models import CausalLM

NEAR = 0.005
"""Bits a byte (nats a token where bytes are unknown) within which a loss counts as no worse."""


def memory_parts(model: CausalLM) -> tuple[str, ...]:
    """The parts of the model's memory that can be forgotten alone, by name."""
    with torch.inference_mode():
        state = model.model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True).past_key_values
    return () if state is None else tuple(state.parts)


def evaluate_memory(
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Callable[[], Iterable[Document]],
    cuts: Sequence[int] = CUTS,
    parts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    piece_length: int | None = None,
    on_progress: Callable[[int, int, Progress], None] | None = None,
) -> dict[str, Any]:
    """Score documents with the memory, or a part of it, forgotten after every so many tokens, and with none forgotten.

    Args:
        model: in evaluation mode.
        documents: gives them anew at each call.
        cuts: tokens between two places where something is forgotten.
        parts: of `memory_parts`; None: all of them.
        max_tokens, piece_length: as in `evaluate_perplexity`.
        on_progress: called with the number of the reading, how many there are, and how far it is.

    Returns:
        A dict ready for JSON: `never` (overall scores and `by_position`); `cuts`, one entry a cut and part with
        `every`, `part` (None: everything), and the overall scores, or `left_out` with the reason where the part cannot
        be told apart there; `reach`: the shortest cut of everything that costs no more than `near`, or None.

    Raises:
        ValueError: a cut is not positive, there is no such part, or as `evaluate_perplexity`.
    """
    there = memory_parts(model)
    for cut in cuts:
        if cut < 1:
            raise ValueError(f"cuts has {cut}; each must be 1 or more")
    for name in parts or ():
        if name not in there:
            raise ValueError(f"parts has {name!r}; this model's memory has {', '.join(there) or 'no parts'}")
    readings = [(cut, part) for cut in sorted(cuts) for part in (None, *(there if parts is None else parts))]

    def score(number: int, cut: int | None, part: str | None) -> dict[str, Any]:
        told = None if on_progress is None else lambda progress: on_progress(number, len(readings) + 1, progress)
        return evaluate_perplexity(
            model, tokenizer, documents(), piece_length, max_tokens, told, reset_every=cut, forget=part
        )

    never = score(0, None, None)
    alignment = model.model.dimensions.alignment
    entries: list[dict[str, Any]] = []
    for number, (cut, part) in enumerate(readings, 1):
        entry: dict[str, Any] = {"every": cut, "part": part}
        if part is not None and cut % alignment:
            entry["left_out"] = f"not a multiple of the chunk of {alignment} tokens"
        else:
            entry |= score(number, cut, part)["overall"]
        entries.append(entry)
    key = "loss" if never["overall"]["bits_per_byte"] is None else "bits_per_byte"
    near = (e["every"] for e in entries if e["part"] is None and e[key] <= never["overall"][key] + NEAR)
    return {
        "never": {**never["overall"], "by_position": never["by_position"]},
        "cuts": entries,
        "near": NEAR,
        "reach": next(near, None),
    }
