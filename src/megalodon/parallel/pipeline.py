"""Pipeline parallelism: PyTorch's 1F1B schedules over stages, each micro-batch with the memory that its rows carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from megalodon.models import State
from megalodon.parallel.collectives import Group
from megalodon.parallel.stage import Rows, Stage

CAN_MEASURE = hasattr(Schedule1F1B, "eval")
"""Whether this PyTorch's schedules can go forward only, as held-out measurements do; from 2.9 on."""


class PipelinedStage(Stage):
    """A stage that a schedule calls by the number of the micro-batch: rows and states do not travel."""

    rows: Sequence[Rows] = ()
    divisor: float = 1.0

    def forward(self, *activations: Tensor, number: Tensor) -> Tensor:  # type: ignore[override]
        """[B, l, D / T] of the stage before, nothing for the first -> what `Stage.forward` gives of the same rows.

        The loss is [1]: a schedule joins what its last stage gives.
        """
        index = int(number)
        out, state = super().forward(activations[0] if activations else None, self.rows[index])
        self.states[index] = None if state is None else state.detach()
        return (out / self.divisor)[None] if self.is_last else out

    def begin(self, rows: Sequence[Rows], divisor: float) -> None:
        """Take the micro-batches of a step."""
        self.rows, self.divisor = rows, divisor
        self.states: list[State | None] = [None] * len(rows)


class Pipeline:
    """The schedule of this rank's stages.

    Args:
        stages: this rank's; stage number i * ranks + rank each, i = 0, 1, ...
        group: the pipeline's ranks.
    """

    def __init__(self, stages: Sequence[PipelinedStage], group: Group, device: torch.device) -> None:
        self.stages, self.group, self.device = stages, group, device
        self._schedules: dict[tuple[int, ...], Any] = {}

    def run(self, rows: Sequence[Rows], divisor: float, shape: tuple[int, int, int], backward: bool) -> Tensor:
        """All micro-batches forward, and with `backward` back. Returns the sum of their losses over `divisor`, or zero
        where the last stage is not.

        Args:
            shape: of what travels: (B, l, D / T).
        """
        for stage in self.stages:
            stage.begin(rows, divisor)
        schedule = self._schedule(len(rows), shape)
        numbers = torch.arange(len(rows))
        losses: list[Tensor] = []
        run = schedule.step if backward else schedule.eval
        run(number=numbers, target=numbers, losses=losses)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)

    def _schedule(self, count: int, shape: tuple[int, int, int]) -> Any:
        key = (count, *shape)
        if key not in self._schedules:
            self._schedules[key] = self._build(count, shape)
        return self._schedules[key]

    def _build(self, count: int, shape: tuple[int, int, int]) -> Any:
        ranks, rank = self.group.size(), self.group.rank()
        total = ranks * len(self.stages)
        # The residual stream is float32 under autocast too.
        between = torch.empty(shape, device="meta", dtype=torch.float32, requires_grad=True)
        parts = [
            PipelineStage(
                stage,
                i * ranks + rank,
                total,
                self.device,
                input_args=() if stage.is_first else (between,),
                output_args=(torch.empty(1, device="meta", requires_grad=True),) if stage.is_last else (between,),
                group=self.group,
            )
            for i, stage in enumerate(self.stages)
        ]
        arguments: dict[str, Any] = {"n_microbatches": count, "loss_fn": lambda loss, _: loss[0], "scale_grads": False}
        if len(parts) == 1:
            return Schedule1F1B(parts[0], **arguments)
        # A list of stages, where PyTorch annotates a list of their base class, which is another type.
        return ScheduleInterleaved1F1B(parts, **arguments)  # type: ignore[arg-type]
