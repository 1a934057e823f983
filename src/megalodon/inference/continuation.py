"""One continuation of a text: chooses tokens from logits, turns them into text, and knows when it ends."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.request import Delta, FinishReason, Generation, TokenChoice
from megalodon.inference.sampling import REPETITION_WINDOW, Sampling, sample
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
        self._counts: Counter[int] = Counter()
        self._follower = None if generation.grammar is None else generation.grammar.follow()
        self._biased = torch.tensor([token for token, _ in generation.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in generation.logit_bias], dtype=torch.float64)
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

    def take(self, token: int, logits: Tensor) -> tuple[Delta | None, FinishReason | None]:
        """Go on with a token chosen from logits [V]; (what may be shown, why it ends)."""
        self._recent.append(token)
        self.pending = ("generated", token)
        self.generated += 1
        self._counts[token] += 1
        self._unsent.append(self._described(token, logits))
        if self._follower is not None:
            self._follower.take(token)
        return self._show(token)

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits [V] as this continuation alone wants them before sampling: penalties, bias, what may come next."""
        generation = self.generation
        if generation.logit_bias or ((generation.frequency_penalty or generation.presence_penalty) and self._counts):
            logits = logits.clone()
        if generation.logit_bias:
            logits[self._biased] += self._bias.to(logits)
        if (generation.frequency_penalty or generation.presence_penalty) and self._counts:
            ids = torch.tensor(list(self._counts), dtype=torch.int64)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[ids] -= counts * generation.frequency_penalty + generation.presence_penalty
        if self._follower is not None:
            return self._follower.restrict(logits)
        if self.generated < generation.min_tokens and self._ends:
            logits = logits.clone()
            logits[sorted(self._ends)] = -torch.inf
        return logits

    @property
    def _ends(self) -> frozenset[int]:
        end = self._tokenizer.eos_token_id
        own = frozenset() if end is None or self.generation.ignore_end else frozenset((end,))
        return self.generation.stop_tokens | own

    def _show(self, token: int) -> tuple[Delta | None, FinishReason | None]:
        reason = None
        if token in self._ends:
            text, reason = self._stopping.feed(self._decoder.flush()), FinishReason.stop
            if not self.generation.tell_end:
                self._unsent.pop()  # what ends the text is no part of it
        else:
            text = self._decoder.feed(token)
            if self.generated >= self.generation.min_tokens:
                text = self._stopping.feed(text)
            if self._stopping.stopped or (self._follower is not None and self._follower.complete):
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


def choose_tokens(continuations: Sequence[Continuation], logits: Tensor) -> list[int | Exception]:
    """The next token of each continuation, chosen from its row of logits [B, V], or why there is none.

    Rows of the same settings are sampled together, each with its own generator: what a row gives does not depend on the
    others.
    """
    alike: dict[tuple[Sampling, int], list[int]] = {}
    for row, one in enumerate(continuations):
        sampling = one.generation.sampling
        looks_at = len(one._recent) if sampling.repetition_penalty != 1 else 0
        alike.setdefault((sampling, looks_at), []).append(row)
    chosen: list[int | Exception] = [0] * len(continuations)
    for (sampling, looks_at), rows in alike.items():
        groups = [rows] if all(_is_plain(continuations[row]) for row in rows) else [[row] for row in rows]
        while groups:
            group = groups.pop()
            members = [continuations[row] for row in group]
            recent = torch.tensor([list(one._recent) if looks_at else [] for one in members], dtype=torch.int64)
            try:
                scores = logits[group] if _is_plain(members[0]) else members[0].adjusted(logits[group[0]])[None]
                tokens = sample(scores, recent, sampling, [one._generator for one in members]).tolist()
            except Exception as error:  # nothing was drawn yet: find out whose row it is
                if len(group) > 1:
                    groups += [[row] for row in group]
                    continue
                tokens = [error]
            for row, token in zip(group, tokens, strict=True):
                chosen[row] = token
    return chosen


def _is_plain(one: Continuation) -> bool:
    generation = one.generation
    return one._follower is None and not (
        generation.logit_bias or generation.min_tokens or generation.frequency_penalty or generation.presence_penalty
    )


def choice_seed(seed: int, index: int) -> int:
    """The generator's seed for one of several choices; the first one's is `seed` itself, to 64 bits."""
    if index == 0:
        return seed % 2**63
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63
