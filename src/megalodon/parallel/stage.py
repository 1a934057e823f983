"""The part of a model on one rank: some layers, with the embedding before the first and the head after the last.

Parameters keep the names that they have in the whole Transformers model, so that checkpoints do not depend on the mesh.
A stage computes losses, not logits, and takes whole rows: it cuts its own span out of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon.models import CausalLM, Config, State
from megalodon.models.loss import LOGITS_AT_ONCE, sum_in_slices, summed_loss
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.segments import Segments
from megalodon.parallel import tensor
from megalodon.parallel.block import Axes
from megalodon.parallel.collectives import gather_last
from megalodon.parallel.spans import SpanLayout, Spans, default_borders


@dataclass(frozen=True)
class Rows:
    """Whole rows of a batch, the same on all ranks that share them.

    Attributes:
        input_ids, labels: int64 [B, L]; labels are shifted, -100 is ignored.
        segment_ids: int [B, L] or None; a change starts a document.
        state: what the rows carry from the batch before, this rank's layers and channels; None: nothing.
        use_cache: whether a state is wanted after the last token.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor | None
    state: State | None
    use_cache: bool


class Stage(nn.Module):
    """Layers `layers` of a model.

    Args:
        model: the whole model; the stage takes over the parts it needs.
        layers: consecutive indices.
        axes: the groups of the tensor and the chunk axis.
        chunk_rank: this rank's place on the chunk axis.
        precision: "float32", or "bfloat16" for autocast.
    """

    def __init__(self, model: CausalLM, layers: range, axes: Axes, chunk_rank: int, precision: str = "float32") -> None:
        super().__init__()
        whole = model.model
        self.config: Config = model.config
        self.axes, self.chunk_rank, self.precision = axes, chunk_rank, precision
        self.first_memory = 0  # where in the rank's states this stage's layers begin
        self.is_first, self.is_last = layers.start == 0, layers.stop == len(whole.layers)
        self.kind = type(whole)
        self.embedding_scale, self.vocab_size = whole.embedding_scale, model.vocab_size
        self.model: Any = nn.Module()
        if self.is_first:
            self.model.embed_tokens = whole.embed_tokens
        self.model.layers = nn.ModuleDict({str(i): whole.layers[i] for i in layers})
        if self.is_last:
            self.model.final_norm = whole.final_norm
            self.lm_head = model.lm_head

    def forward(self, x: Tensor | None, rows: Rows) -> tuple[Tensor, State | None]:
        """Run the stage on this rank's span.

        Args:
            x: [B, l, D / T]; what the stage before gave; the first stage ignores it and reads `rows`.

        Returns:
            What the next stage reads, or from the last the summed loss of this rank's span (scalar); and the state
            after the rows, of this stage's layers, where it is wanted.
        """
        with torch.autocast(rows.input_ids.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self._forward(x, rows)

    def _forward(self, x: Tensor | None, rows: Rows) -> tuple[Tensor, State | None]:
        layout, own = self._layout(rows)
        if self.is_first:
            x = self._embed(rows.input_ids[:, own])
        assert x is not None
        arguments = self.kind.layer_arguments(self.config, layout)
        after = []
        for place, block in enumerate(self.model.layers.values(), self.first_memory):
            memory = None if rows.state is None else rows.state.layers[place]
            x, memory = block(x, memory, *arguments, layout, rows.use_cache)
            after.append(memory)
        final = None
        if self.is_last:
            x, final = self.model.final_norm(x, None if rows.state is None else rows.state.final, layout)
            x = self._loss(x, rows.labels[:, own])
        return x, self._state(after, final, layout) if rows.use_cache else None

    def _layout(self, rows: Rows) -> tuple[Layout, slice]:
        """The layout of this rank's span, and the span."""
        batch, length = rows.input_ids.shape
        positions = np.zeros(batch, dtype=np.int64) if rows.state is None else rows.state.position.numpy()
        size: Any = getattr(self.config, "chunk_size", None)
        device = rows.input_ids.device
        if self.axes.chunk is None:
            layout = layout_of(
                batch, length, device, segment_ids=rows.segment_ids, positions=positions, chunk_size=size
            )
            bos = self.kind.segment_starts(self.config, rows.input_ids)
            if bos is not None:
                layout.segments = Segments(bos, layout, None if rows.state is None else rows.state.bos_places)
            return layout, slice(None)
        borders = default_borders(length, self.axes.chunk.size())
        spans = Spans(borders, self.chunk_rank, rows.segment_ids, positions, size, self.config.chunks_before)
        return SpanLayout(spans, rows.segment_ids, device), spans.own

    def _embed(self, ids: Tensor) -> Tensor:
        table = self.model.embed_tokens
        group = self.axes.tensor
        x = table(ids) if group is None else tensor.embed(tensor.local(table.weight), ids, group)
        return F.dropout(x * self.embedding_scale, self.config.dropout, self.training)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The summed loss."""
        group = self.axes.tensor
        if group is None:
            return summed_loss(self.lm_head, x, targets)

        def loss_of(x: Tensor, targets: Tensor) -> Tensor:
            return tensor.cross_entropy(self.lm_head(x).float(), targets, group)

        rows = LOGITS_AT_ONCE * group.size() // self.vocab_size
        return sum_in_slices(loss_of, gather_last(x, group), targets, rows)

    def _state(self, layers: Sequence[Any], final: Any, layout: Layout) -> State:
        """The state after the rows; an earlier stage's has no final norm's memory."""
        end = layout.spans.end.position if isinstance(layout, SpanLayout) else layout.end_positions
        kind = self.kind.state_class
        return kind(layers, final, torch.from_numpy(end), kind.dimensions_class.of(self.config))


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """The layers of each stage: as equal as can be, the later stages (which hold the head) never the larger."""
    size, more = divmod(num_layers, stages)
    ranges, first = [], 0
    for stage in range(stages):
        count = size + (stage < more)
        ranges.append(range(first, first + count))
        first += count
    return ranges
