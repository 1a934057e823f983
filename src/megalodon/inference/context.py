"""A saved context: all that is needed to go on with a text later exactly as if it had never been put down.

In memory it is what a `Session` stands on: the model's state and one token that the state has not seen. Its file is a
`snapshot_file`, the same that the server reads and writes, of constant size whatever the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.sampling import REPETITION_WINDOW
from megalodon.inference.snapshot import Segment, Snapshot
from megalodon.inference.snapshot_file import ModelIdentity, load_snapshot, save_snapshot
from megalodon.models import CausalLM, State
from megalodon.models.storage import Storage


@dataclass(frozen=True)
class Context:
    """Where a sequence stands.

    Attributes:
        state: the model's state after all tokens but the last; one row.
        pending: the last token, which the state has not seen.
        recent: the last tokens, `pending` included, at most `sampling.REPETITION_WINDOW`.
        tokens: how many tokens the sequence has, `pending` included.
        generator: the random generator's state, uint8 [n].
    """

    state: State
    pending: int
    recent: tuple[int, ...]
    tokens: int
    generator: Tensor

    def save(self, path: Path, model: CausalLM, tokenizer: Tokenizer, storage: Storage = "exact") -> None:
        """Write the file under a temporary name, then rename it.

        Args:
            storage: "int8" or "fp8" take a quarter of the bytes for keys, values and working memories, and lose a
                little: going on is then no longer what never stopping would have given.

        Raises:
            OSError: if it cannot be written; an earlier file of this name is then as it was.
        """
        tail = (Segment("read", np.array([self.pending], dtype=np.int64)),)
        snapshot = Snapshot(self.state, self.tokens - 1, None, False, self.recent[:-1], tail, self.generator)
        save_snapshot(path, snapshot, ModelIdentity.of(model, tokenizer, storage=storage))

    @staticmethod
    def load(path: Path, model: CausalLM, tokenizer: Tokenizer) -> Context:
        """The context in a file, on the model's device. Tokens that its state has not seen, but the last, are read.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or no context, or belongs to another model or tokenizer.
        """
        try:
            return _taken_up(load_snapshot(path, ModelIdentity.of(model, tokenizer)), model)
        except ValueError as error:
            raise ValueError(f"context {path} cannot be used: {error}") from None


@torch.inference_mode()
def _taken_up(snapshot: Snapshot, model: CausalLM) -> Context:
    if not snapshot.tail:
        raise ValueError("it holds no token to go on from")
    tail = np.concatenate([segment.tokens for segment in snapshot.tail])
    state, generator = snapshot.state, snapshot.generator
    if len(tail) > 1:
        ids = torch.from_numpy(tail[:-1])[None].to(model.device)
        state = model.model(ids, past_key_values=state, use_cache=True).past_key_values
    if generator is None:  # nothing was drawn yet
        fresh = torch.Generator()
        fresh.seed()
        generator = fresh.get_state()
    recent = (*snapshot.recent, *tail[-REPETITION_WINDOW:].tolist())[-REPETITION_WINDOW:]
    return Context(state, int(tail[-1]), recent, snapshot.tokens, generator)
