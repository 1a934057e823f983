"""What a request may want to know of the text it reads, besides what follows it: its tokens' log-probabilities, or the
mean of its hidden states.

A watch is shown every piece that is read, by the engine's thread. The pieces depend on the text alone, and so does what
is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

ROWS = 64
"""Hidden states that are made logits of at a time: a fixed number, so that memory does not depend on the piece."""


@dataclass(frozen=True)
class TokenChoice:
    """A token: its id and, where asked for, log-probabilities of it and of the likeliest ones."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Watch(ABC):
    """Looks at a text while it is read.

    Attributes:
        needs_last: whether the state after the last token is wanted too. Then nothing can be generated.
    """

    needs_last = False

    @abstractmethod
    def piece(self, tokens: np.ndarray, hidden: Tensor, head: nn.Module) -> None:
        """`tokens` int64 [n] were read and left hidden states [n, D], which `head` makes logits of."""

    @abstractmethod
    def step(self, logits: Tensor) -> None:
        """One token of the sequence was decoded and left logits [V]; it is no part of the text."""

    @abstractmethod
    def last(self, token: int) -> None:
        """The last token of the text, which no piece holds."""


class Scores(Watch):
    """Log-probabilities of the text's own tokens.

    Attributes:
        tokens: so far. The first one has no log-probability at the beginning of a sequence.
    """

    def __init__(self, likeliest: int, vocab_size: int, skip: int = 0) -> None:
        """`likeliest`: of how many tokens besides; `skip`: tokens of the sequence before the text."""
        self.tokens: list[TokenChoice] = []
        self._likeliest, self._vocab_size, self._skip = min(likeliest, vocab_size), vocab_size, skip
        self._upcoming: Tensor | None = None  # log-probabilities [V] of what comes next

    def piece(self, tokens: np.ndarray, hidden: Tensor, head: nn.Module) -> None:
        for start in range(0, len(tokens), ROWS):
            logits = head(hidden[start : start + ROWS])[:, : self._vocab_size].float()
            self._rows(tokens[start : start + ROWS], logits.log_softmax(-1).cpu())

    def step(self, logits: Tensor) -> None:
        self._upcoming = logits[: self._vocab_size].float().log_softmax(-1).cpu()
        self._skip -= 1

    def last(self, token: int) -> None:
        self._note(token, self._upcoming)

    def _rows(self, tokens: np.ndarray, logprobs: Tensor) -> None:
        """`logprobs` [n, V] are of what comes after each of `tokens` [n]."""
        before = [self._upcoming, *logprobs[:-1]]
        for token, row in zip(tokens.tolist(), before, strict=True):
            self._note(token, row)
        self._upcoming = logprobs[-1].clone()

    def _note(self, token: int, logprobs: Tensor | None) -> None:
        if self._skip > 0:
            self._skip -= 1
        elif logprobs is None:
            self.tokens.append(TokenChoice(token))
        else:
            values, ids = logprobs.topk(self._likeliest)
            likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            self.tokens.append(TokenChoice(token, float(logprobs[token]), likeliest))


class Mean(Watch):
    """The mean of the final hidden states, in float64."""

    needs_last = True

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def piece(self, tokens: np.ndarray, hidden: Tensor, head: nn.Module) -> None:
        total = hidden.double().sum(0).cpu()
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(tokens)

    def step(self, logits: Tensor) -> None:
        raise AssertionError("embeddings go on from no context")

    def last(self, token: int) -> None:
        """Its state was in a piece of its own."""

    @property
    def value(self) -> np.ndarray:
        """float32 [D]."""
        assert self._sum is not None
        return (self._sum / self._count).to(torch.float32).numpy()
