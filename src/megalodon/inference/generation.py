"""Reading a prompt of any length and continuing it, in constant memory, token by token.

The prompt is read in pieces that end at multiples of `piece_length` tokens of the sequence. Its last token is kept back
and fed when the first new one is asked for, so that a sequence always stands in the same way: a state, and one token
that the state has not seen. That is what a `Context` saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.context import Context
from megalodon.inference.sampling import REPETITION_WINDOW, Sampling, sample
from megalodon.inference.stopping import StopStrings
from megalodon.models import CausalLM, State

READ_AT_ONCE = 2048

Piece: TypeAlias = "Sequence[int] | np.ndarray | Tensor"


def default_piece_length(alignment: int) -> int:
    """Tokens read at once: the least multiple of the chunk size that is at least `READ_AT_ONCE`."""
    return -(-READ_AT_ONCE // alignment) * alignment


class Session:
    """One sequence that is read and continued.

    Attributes:
        tokens: length of the sequence so far, in tokens.
        generator: the CPU generator that samples.
    """

    def __init__(
        self,
        model: CausalLM,
        context: Context | None = None,
        seed: int | None = None,
        piece_length: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            context: go on from here; None for an empty sequence.
            seed: of the sampling; None goes on with the context's generator, or takes a random seed.
            piece_length: tokens of a prompt read at once; None for `default_piece_length`.
            vocab_size: only ids below it are generated (a tokenizer may have fewer ids than its model); None for all.

        Raises:
            ValueError: for a piece_length below 1.
        """
        self.model = model
        self.tokens = 0 if context is None else context.tokens
        self.generator = torch.Generator()
        self._piece_length = (
            default_piece_length(model.model.dimensions.alignment) if piece_length is None else piece_length
        )
        if self._piece_length < 1:
            raise ValueError(f"piece_length is {piece_length}; it must be 1 or more")
        self._vocab_size = vocab_size
        self._state: State | None = None if context is None else context.state
        self._pending: int | None = None if context is None else context.pending
        self._recent: deque[int] = deque(() if context is None else context.recent, maxlen=REPETITION_WINDOW)
        if seed is not None:
            self.generator.manual_seed(seed)
        elif context is not None:
            self.generator.set_state(context.generator)
        else:
            self.generator.seed()

    @property
    def recent(self) -> list[int]:
        """The last tokens, at most `REPETITION_WINDOW`."""
        return list(self._recent)

    @property
    def context(self) -> Context:
        """Where the sequence stands now. It may be used again, as often as wanted.

        Raises:
            ValueError: for an empty sequence.
        """
        if self._pending is None:
            raise ValueError("the sequence is empty: read a prompt of at least one token first")
        if self._state is None:  # a prompt of one token, which is pending
            self._state = self._run([])[1]
        return Context(self._state, self._pending, tuple(self._recent), self.tokens, self.generator.get_state())

    def read(self, prompt: Piece | Iterable[Piece], on_piece: Callable[[int], None] | None = None) -> None:
        """Append a prompt of any length to the sequence.

        Args:
            prompt: token ids, or an iterator of pieces of them; no more is held than one of its pieces and one of ours.
            on_piece: called with the number of tokens after each that the model has read.

        Raises:
            ValueError: for ids that the model does not have.
        """
        waiting = np.array([] if self._pending is None else [self._pending], dtype=np.int64)
        fed = self.tokens - len(waiting)
        for piece in _pieces(prompt):
            self._recent.extend(piece[-REPETITION_WINDOW:].tolist())
            waiting = np.concatenate([waiting, piece])
            while len(waiting) > (room := self._piece_length - fed % self._piece_length):
                fed = self._read_piece(waiting[:room], fed, on_piece)
                waiting = waiting[room:]
        if len(waiting) > 1:
            fed = self._read_piece(waiting[:-1], fed, on_piece)
        if len(waiting):
            self._pending, self.tokens = int(waiting[-1]), fed + 1

    def generate(
        self, max_tokens: int, sampling: Sampling | None = None, stop_tokens: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue the sequence, one token at a time.

        Args:
            max_tokens: end after so many.
            sampling: how tokens are chosen; None samples from the model's distribution.
            stop_tokens: end after any of these, such as the end of a document.

        Raises:
            ValueError: if the sequence is empty, or the model's logits are not finite.
        """
        sampling = sampling or Sampling()
        for _ in range(max_tokens):
            token = self._next(sampling)
            yield token
            if token in stop_tokens:
                return

    @torch.inference_mode()
    def _next(self, sampling: Sampling) -> int:
        if self._pending is None:
            raise ValueError("the prompt is empty: give at least one token to continue")
        logits, state = self._run([self._pending])
        if self._vocab_size is not None:
            logits[:, self._vocab_size :] = -torch.inf
        token = int(sample(logits, torch.tensor([self.recent]), sampling, self.generator))
        # all at once, so that an interruption during the work above leaves the sequence as it was
        self._state, self._pending, self.tokens = state, token, self.tokens + 1
        self._recent.append(token)
        return token

    def _read_piece(self, ids: np.ndarray, fed: int, on_piece: Callable[[int], None] | None) -> int:
        self._state = self._run(ids)[1]
        if on_piece is not None:
            on_piece(len(ids))
        return fed + len(ids)

    @torch.inference_mode()
    def _run(self, ids: Sequence[int] | np.ndarray) -> tuple[Tensor, State]:
        """Logits [1, V] after the last of `ids` (none for no ids), and the state after it."""
        input_ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))[None].to(self.model.device)
        output = self.model(input_ids, past_key_values=self._state, use_cache=True, logits_to_keep=1)
        return output.logits.flatten(0, 1), output.past_key_values


def generate_stream(
    model: CausalLM,
    prompt: Piece | Iterable[Piece],
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    context: Context | None = None,
) -> Iterator[int]:
    """Token ids that continue a prompt of any length; arguments as those of `Session`, `read` and `generate`.

    Use a `Session` to have the context afterwards.
    """
    session = Session(model, context, seed)
    session.read(prompt)
    yield from session.generate(max_tokens, sampling, stop_tokens)


def generate_text(
    session: Session,
    tokenizer: Tokenizer,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    resumable: bool = False,
) -> Iterator[str]:
    """The continuation as text, in pieces that cut no character. The end of the document ends it.

    Args:
        session: has read its prompt.
        stop: end before any of these strings, which are not shown though their tokens stay in the sequence. One may
            begin in what was read.
        resumable: the session's context will be saved, so leave half a character to whoever resumes it.

    Raises:
        ValueError: as `Session.generate`; and for an empty stop string.
    """
    decoder = tokenizer.stream_decoder()
    stopping = StopStrings(stop, before=decoder.feed(session.recent))  # the decoder keeps half a character, if there is
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    for token in session.generate(max_tokens, sampling, ends):
        if text := stopping.feed(decoder.feed(token)):
            yield text
        if stopping.stopped:
            return
    rest = stopping.feed("" if resumable else decoder.flush()) + stopping.flush()
    if rest:
        yield rest


def _pieces(prompt: Piece | Iterable[Piece]) -> Iterator[np.ndarray]:
    """The prompt as int64 arrays, none of them empty."""
    whole = isinstance(prompt, np.ndarray | Tensor) or (
        isinstance(prompt, Sequence) and all(isinstance(token, int | np.integer) for token in prompt)
    )
    for piece in [prompt] if whole else prompt:
        array = np.asarray(piece, dtype=np.int64).reshape(-1)
        if len(array):
            yield array
