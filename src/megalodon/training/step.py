"""One update of the weights, in the small parts of which it is made: sum up gradients part by part, clip, refuse what
is not finite, move the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megalodon.data import Batch
from megalodon.models import State
from megalodon.training.optimizer import clip_gradients

IGNORED = -100  # the label of a position without a target, as in Transformers

States = list[State | None]
"""What each part of a step's batch carries to the next step; None before the first, and where nothing is carried."""


@dataclass(frozen=True)
class StepResult:
    """What one update was: the mean loss over all its targets in nats, the gradients' norm before clipping, the number
    of targets, and the states to carry to the next step."""

    loss: float
    grad_norm: float
    num_targets: int
    states: States


class NonFiniteError(ArithmeticError):
    """The loss or the gradients' norm is infinite or NaN. The weights are as they were before the step."""

    def __init__(self, loss: float, grad_norm: float) -> None:
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which forward passes run: bfloat16 autocast, or nothing for float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in `parts` equal parts, in order. `parts` divides the number of rows."""
    size = len(batch.input_ids) // parts

    def part(begin: int) -> Batch:
        own = slice(begin, begin + size)
        labels = batch.labels[own]
        return replace(
            batch,
            input_ids=batch.input_ids[own],
            labels=labels,
            segment_ids=None if batch.segment_ids is None else batch.segment_ids[own],
            continues=None if batch.continues is None else batch.continues[own],
            num_tokens=int((labels != IGNORED).sum()),
            num_bytes=None,  # of the whole batch; a part's is not needed
            rows=batch.rows[own],
        )

    return [part(begin) for begin in range(0, size * parts, size)] if parts > 1 else [batch]


def next_state(state: State | None, continues: Tensor | None) -> State | None:
    """The state to read a part of a batch with: rows that begin something new start afresh."""
    if state is None or continues is None:
        return None
    return state.reset(~continues)


def forward_loss(model: nn.Module, part: Batch, state: State | None, divisor: int) -> tuple[Tensor, State | None]:
    """The summed loss of a part's targets over `divisor` (scalar), and the state after it where rows read on."""
    output = model(
        part.input_ids,
        shift_labels=part.labels,
        segment_ids=part.segment_ids,
        past_key_values=next_state(state, part.continues),
        use_cache=part.continues is not None,
        num_items_in_batch=divisor,
        return_logits=False,
    )
    return output.loss, output.past_key_values


def accumulate_gradients(
    model: nn.Module, parts: Sequence[Batch], states: States, num_targets: int, device: torch.device, precision: str
) -> tuple[Tensor, States]:
    """Add the gradients of the mean loss over `num_targets` to the parameters', one part after another.

    Gradients do not flow into the states, which are detached: back-propagation is truncated at the step.

    Returns:
        The loss (scalar tensor, on `device`), and each part's state after it.
    """
    total = torch.zeros((), device=device)
    carried: States = []
    for part, state in zip(parts, states, strict=True):
        with autocast(device, precision):
            loss, after = forward_loss(model, part.to(device), state, num_targets)
        loss.backward()
        total += loss.detach()
        carried.append(None if after is None else after.detach())
    return total, carried


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Batch],
    states: States,
    *,
    max_grad_norm: float | None,
    device: torch.device,
    precision: str = "float32",
) -> StepResult:
    """Update the weights once on the parts of a batch, with the learning rate that the optimiser has.

    Raises:
        NonFiniteError: if the loss or the gradients are not finite; then nothing was changed.
    """
    num_targets = sum(part.num_tokens for part in parts)
    optimizer.zero_grad(set_to_none=True)
    loss, carried = accumulate_gradients(model, parts, states, num_targets, device, precision)
    norm = clip_gradients(model.parameters(), max_grad_norm)
    if not torch.isfinite(loss + norm):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(loss.item(), norm.item())
    optimizer.step()
    return StepResult(loss.item(), norm.item(), num_targets, carried)
