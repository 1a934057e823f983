"""One continuation of a text: chooses tokens from logits, turns them into text, and knows when it ends."""

from __future__ import annotations

import hashlib
from collections import deque

import torch
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.request import Delta, FinishReason, Generation, TokenChoice
from megalodon.inference.sampling import REPETITION_WINDOW, sample
from megalodon.inference.snapshot import History, Kind
from megalodon.inference.stopping import StopStrings


class Continuation:
    """Choice `index` of a request.

    Attributes:
        pending: the next token to feed, and whether it was read or generated.
        generated: tokens chosen so far.
        history: for snapshots; None when none will be asked for.
    """

    def __init__(
        self,
        index: int,
        generation: Generation,
        tokenizer: Tokenizer,
        recent: list[int],
        pending: tuple[Kind, int],
        history: History | None,
        generator: Tensor | None,
    ) -> None:
        """`recent`: the last tokens of the sequence, `pending` included; `generator`: the state to resume, if any."""
        self.index, self.generation, self.pending, self.history = index, generation, pending, history
        self.generated = 0
        self._tokenizer = tokenizer
        self._recent = deque(recent, maxlen=REPETITION_WINDOW)
        self._decoder = tokenizer.stream_decoder()
        self._decoder.feed(recent)  # it keeps half a character, if the text ends in one
        self._stopping = StopStrings(generation.stop)
        self._generator = torch.Generator()
        self._unsent: list[TokenChoice] = []
        if generation.seed is not None:
            self._generator.manual_seed(choice_seed(generation.seed, index))
        elif generator is not None and generation.resume_generator and index == 0:
            self._generator.set_state(generator)
        else:
            self._generator.seed()

    @property
    def generator_state(self) -> Tensor:
        """uint8 [n]."""
        return self._generator.get_state()

    def choose(self, logits: Tensor) -> tuple[Delta | None, FinishReason | None]:
        """Choose the next token from logits [1, V]; (what may be shown, why it ends).

        Raises:
            ValueError: if the logits are not finite.
        """
        logits = logits.clone()
        logits[:, self._tokenizer.vocab_size :] = -torch.inf
        token = int(sample(logits, torch.tensor([list(self._recent)]), self.generation.sampling, self._generator))
        self._recent.append(token)
        self.pending = ("generated", token)
        self.generated += 1
        self._unsent.append(self._described(token, logits[0]))
        return self._show(token)

    def _show(self, token: int) -> tuple[Delta | None, FinishReason | None]:
        reason = None
        if token == self._tokenizer.eos_token_id and not self.generation.ignore_end:
            text, reason = self._stopping.feed(self._decoder.flush()), FinishReason.stop
            self._unsent.pop()  # the end of a document is no part of the text
        else:
            text = self._stopping.feed(self._decoder.feed(token))
            if self._stopping.stopped:
                reason = FinishReason.stop
            elif self.generated >= self.generation.max_tokens:
                if self.history is None:  # otherwise half a character is left to whoever goes on
                    text += self._stopping.feed(self._decoder.flush())
                reason = FinishReason.length
        if reason is not None and not self._stopping.stopped:
            text += self._stopping.flush()
        if not text and reason is None:
            return None, None
        tokens, self._unsent = tuple(self._unsent), []
        return Delta(self.index, text, tokens), reason

    def _described(self, token: int, logits: Tensor) -> TokenChoice:
        if self.generation.logprobs is None:
            return TokenChoice(token)
        logprobs = logits.cpu().log_softmax(-1)
        values, ids = logprobs.topk(min(self.generation.logprobs, self._tokenizer.vocab_size))
        likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenChoice(token, float(logprobs[token]), likeliest)


def choice_seed(seed: int, index: int) -> int:
    """The generator's seed for one of several choices; the first one's is `seed` itself, to 64 bits."""
    if index == 0:
        return seed % 2**63
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63
