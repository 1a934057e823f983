"""Our models in EleutherAI's lm-evaluation-harness, under the name `megalodon`: texts of any length, scored as one.

Importing this registers the model, for `lm_eval.simple_evaluate(model="megalodon", ...)`. On the command line,
`python -m megalodon.evaluation.harness` is `lm_eval` with the model registered. It is the harness's own `hf` model,
with its options, except that texts are read in pieces with a state: memory does not grow with their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from megalodon.models import CausalLM

PIECE = 4096
"""Tokens of a row that are read at a time."""
LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at a time (128 MiB in float32)."""

Request = tuple[Any, list[int], list[int]]
"""What the harness asks: (a key of its cache, the context's tokens, the continuation's tokens)."""


@register_model("megalodon")
class MegalodonLM(HFLM):  # type: ignore[misc]  # a library without types
    """The harness's `hf` model, any of our architectures, with no limit to the length of a text.

    Args: as those of `lm_eval.models.huggingface.HFLM`: `pretrained` (a folder or a model), `tokenizer`, `batch_size`,
        `device`, `dtype`, ...; `max_length` limits texts if it is given.
    """

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that is read as one."""
        return int(self._max_length or self.model.config.max_position_embeddings)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request, the log-likelihood of its continuation, and whether greedy decoding would give it."""
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            scores = continuation_scores(self.model, [(requests[i][1], requests[i][2]) for i in batch], self.max_length)
            for i, score in zip(batch, scores, strict=True):
                found[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return [found[i] for i in range(len(requests))]


@torch.inference_mode()
def continuation_scores(
    model: CausalLM, pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[float, bool]]:
    """The summed log-probability of each continuation after its context, and whether every token is the likeliest.

    Args:
        model: in evaluation mode.
        pairs: (context, continuation), token ids; neither is empty.
        max_length: tokens of a text that are read: the last ones.
    """
    texts = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    width = max(map(len, texts)) - 1
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (text, (_, continuation)) in enumerate(zip(texts, pairs, strict=True)):
        length = len(text) - 1
        ids[row, :length], mask[row, :length] = torch.tensor(text[:-1]), 1
        first = max(length - len(continuation), 0)
        targets[row, first:length] = torch.tensor(text[first + 1 :])
    total, greedy = torch.zeros(len(texts), dtype=torch.float64), torch.ones(len(texts), dtype=torch.bool)
    state = None
    for start in range(0, width, PIECE):
        piece = slice(start, start + PIECE)
        output = model.model(
            ids[:, piece].to(model.device),
            attention_mask=mask[:, piece].to(model.device),
            past_key_values=state,
            use_cache=True,
        )
        state = output.past_key_values
        for rows, values, likeliest in _scored(model, output.last_hidden_state, targets[:, piece]):
            total.index_add_(0, rows, values)
            greedy[rows[~likeliest]] = False
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _scored(model: CausalLM, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(row, log-probability float64, whether it is the likeliest) of the targets [B, L] that are not -100, in parts."""
    row, column = (targets != -100).nonzero(as_tuple=True)
    at_once = max(LOGITS_AT_ONCE // model.vocab_size, 1)
    for rows, columns in zip(row.split(at_once), column.split(at_once), strict=True):
        wanted = targets[rows, columns].to(hidden.device)
        logits = model.lm_head(hidden[rows.to(hidden.device), columns.to(hidden.device)]).float()
        values = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        yield rows, values.double().cpu(), (logits.argmax(-1) == wanted).cpu()


def main() -> None:
    """`lm_eval`, with our model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
