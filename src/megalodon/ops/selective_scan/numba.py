"""Mamba-2's scan on a CPU with what stands between its products compiled: see `ops.compiled.state_spaces`.

For float32 (and bfloat16, widened); the rest as in `scalar`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megalodon.ops import compiled
from megalodon.ops.compiled.tables import Scan
from megalodon.ops.layout import Layout
from megalodon.ops.selective_scan import blocked, scalar

KERNELS = ("open", "weigh", "weigh_back", "carry", "carry_back", "close", "open_back", "close_back")


def fits(x: Tensor) -> bool:
    """Whether the kernels take x, and can be had."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    return all(compiled.kernel(f"state_spaces.{name}") is not None for name in KERNELS)


class CompiledSpan(scalar.Span):
    """The same in single passes over memory."""

    def _call(self, name: str, **tensors: Tensor | None) -> None:
        kernel = compiled.kernel(f"state_spaces.{name}")
        assert kernel is not None, "`fits` has asked for it"
        rows, chunks, size, heads, width = self.x.shape
        x = self.x if self.x.stride()[-2:] == (width, 1) and self._even() else self.x.contiguous()
        table = np.zeros(len(Scan), np.int64)
        table[[Scan.rows, Scan.chunks, Scan.size, Scan.heads]] = rows, chunks, size, heads
        table[[Scan.groups, Scan.width, Scan.state]] = self.b.shape[2], width, width * self.b.shape[-1]
        table[[Scan.token_step, Scan.row_step]] = x.stride(2), x.stride(0)
        own: dict[str, Tensor | None] = {
            "x": x, "entering": self.entering, "leaving": self.leaving, "decay": self.decay, "sums": self.sums,
            "weight": self.weight, "document": self.document, "skip": self.skip,
        }  # fmt: skip
        kept = {field: value.contiguous() for field, value in own.items() if value is not None and field != "x"}
        for field, value in (*kept.items(), ("x", x), *tensors.items()):
            if value is not None:
                assert value.is_contiguous() or field == "x", field
                table[getattr(Scan, field)] = value.data_ptr()
        kernel(table, self.x.numel())

    def _even(self) -> bool:
        """Whether chunk follows on chunk, as token on token."""
        return self.x.stride(1) == self.x.stride(2) * self.x.shape[2]

    def _like(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape)

    def weights(self) -> Tensor:
        out = self._like(*self.sums.shape, self.sums.shape[-1])
        self._call("weigh", scores=self.scores().contiguous(), weights=out)
        return out

    def opened(self) -> tuple[Tensor, Tensor]:
        rows, chunks, size, heads, width = self.x.shape
        written, kept = self._like(rows, chunks, heads, size, width), self._like(*self.x.shape)
        self._call("open", written=written, kept=kept)
        return written, kept

    def carried(self, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        before, last = torch.empty_like(added), state.clone(memory_format=torch.contiguous_format)
        self._call("carry", added=added, before=before, last=last)
        return before, last

    def closed(self, inter: Tensor, intra: Tensor) -> Tensor:
        inter = inter.contiguous()
        self._call("close", inter=inter, intra=intra.contiguous())
        return inter

    def opened_back(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        rows, chunks, size, heads, width = self.x.shape
        scaled, by_head = self._like(*self.x.shape), self._like(rows, chunks, heads, size, width)
        self._call("open_back", dy=dy.contiguous(), scaled=scaled, heads_first=by_head)
        return scaled, by_head

    def weights_back(self, known: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        rows, chunks, _, size = self.sums.shape
        d_scores, d_sums = self._like(rows, chunks, self.b.shape[2], size, size), torch.empty_like(self.sums)
        self._call("weigh_back", known=known, weights=d_weights.contiguous(), scores=d_scores, d_sums=d_sums)
        return d_scores, d_sums

    def carried_back(self, before: Tensor, d_before: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_before, last = d_before.contiguous(), d_state.clone(memory_format=torch.contiguous_format)
        d_decay = self._like(*self.decay.shape)
        self._call("carry_back", before=before, added=d_before, last=last, d_decay=d_decay)
        return d_before, d_decay, last

    def closed_back(
        self, dy: Tensor, scaled: Tensor, inter: Tensor, through: Tensor, intra: Tensor
    ) -> tuple[Tensor, ...]:
        dx, each = self._like(*self.x.shape), [self._like(*self.entering.shape) for _ in range(4)]
        d_weight, d_entering, d_leaving, d_skip = each
        self._call(
            "close_back", dy=dy.contiguous(), scaled=scaled, inter=inter.contiguous(), kept=through.contiguous(),
            intra=intra.contiguous(), dx=dx, d_weight=d_weight, d_entering=d_entering, d_leaving=d_leaving,
            d_skip=d_skip,
        )  # fmt: skip
        return dx, d_weight, d_entering, d_leaving, d_skip


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """See `megalodon.ops.selective_scan`."""
    kind = CompiledSpan if x.ndim == 4 and x.shape[1] > 1 and fits(x) else scalar.Span
    return blocked.selective_scan(x, dt, a, b, c, skip, initial_state, layout, kind)
