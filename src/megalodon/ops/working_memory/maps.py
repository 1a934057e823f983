"""A span's effect on the memory, as a map that composes: what chunk parallelism sends around.

Absorbing chunks turns the memory M of a head into `P M + Q`, P [d, d] and Q [d, e]. P and Q depend on what was before
the span only through its log mass, a [d] vector a head that adds up by itself. So spans can be worked on apart: first
their own log masses travel, then (P, Q), and neither needs anyone to wait in line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megalodon.ops.working_memory.scan import absorb, log_masses, running_log_mass


class MemoryMap(NamedTuple):
    """`M -> decay M + added`: decay [..., H, d, d], added [..., H, d, e]."""

    decay: Tensor
    added: Tensor

    def apply(self, memory: Tensor) -> Tensor:
        """The memory after the span, of that before it: [..., H, d, e]."""
        return torch.matmul(self.decay, memory) + self.added

    def after(self, earlier: MemoryMap) -> MemoryMap:
        """The map of an earlier span and this one."""
        return MemoryMap(torch.matmul(self.decay, earlier.decay), self.apply(earlier.added))


def span_log_mass(k: Tensor, steps: Sequence[int], live: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """The log mass that chunks by themselves leave behind: [K, H, d], all K sequences in every step.

    `logaddexp` joins it to that of what was before, unless a segment that begins in the span forgets it. Arguments are
    those of `absorb`.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    own = log_masses(k, live, dtype)
    nothing = torch.full_like(own[: steps[0]], -torch.inf)
    return running_log_mass(own, nothing, keep, steps)[-steps[-1] :]


def memory_maps(
    k: Tensor,
    v: Tensor,
    log_mass: Tensor,
    steps: Sequence[int],
    live: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[MemoryMap, Tensor]:
    """The maps from the memory before the first chunk to that after each, and the log masses after each, [T, H, d].

    Arguments are those of `absorb`; log_mass [K, H, d] is that of all before the span. They cost (d + e) / e of
    `absorb`: they are what it does to the columns of [I, 0] with the values [0, v].
    """
    dim, width = k.shape[-1], v.shape[-1]
    dtype = log_mass.dtype
    identity = torch.eye(dim, dim + width, dtype=dtype, device=k.device).expand(*log_mass.shape[:2], -1, -1)
    values = torch.cat([v.new_zeros(*v.shape[:-1], dim), v], dim=-1)
    both, masses = absorb(k, values, identity, log_mass, steps, live, keep)
    return MemoryMap(both[..., :dim], both[..., dim:]), masses
