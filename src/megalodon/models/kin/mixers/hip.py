"""HiP (arXiv 2406.09827): attention to key blocks that a tree search finds, for a Transformer as it is: nothing is
trained, and the weights are attention's own.

The published search looks at queries of a whole block, so that which keys a query sees depends on later ones, and
counts blocks from the start of a call. Here blocks count from the document's start, and the first query of a block
searches for all of it, among keys older than the window: what it finds is causal, and the same however the text is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.attention import Attention
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, NotNegative
from megalodon.models.kin.mixers.context import Context, context_of
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues
from megalodon.ops.layout import Layout

SEARCH_NUMBERS = 2**22
"""Key numbers that a strip of searches gathers at once."""

ATTENTION_NUMBERS = 2**20
"""Entries of the lists of keys that live at once, where every query needs its own."""


@dataclass(frozen=True)
class HipMemory(Memory):
    """past: keys and values of all that was read; probe: [B, H, d], the query that began the open block."""

    past: KeysAndValues
    probe: Tensor


class Hip(Attention):
    """Attention over `mask_size` keys found for each block of queries, the first keys, and a window."""

    kind = "growing"
    two_way_mode = False

    class Parameters(Attention.Parameters):
        """mask_size: keys that a search finds, 0 for none beside sinks and window; query_block: queries that share a
        search; key_block: keys that are found together; window: keys until a block's first query that it sees in any
        case, with those after; sinks: the same, of the document's first keys."""

        mask_size: NotNegative = 512
        query_block: AtLeastOne = 32
        key_block: AtLeastOne = 2
        window: AtLeastOne = 128
        sinks: NotNegative = 32

        def check(self, config: KinConfig) -> None:
            if self.mask_size % self.key_block:
                raise ValueError(f"hip: mask_size={self.mask_size} is not divisible by key_block={self.key_block}")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.given = parameters

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> HipMemory:  # type: ignore[override]  # more than attention's
        probe = torch.zeros(batch, self.num_heads, self.head_dim, device=device, dtype=dtype)
        return HipMemory(super().empty(batch, device, dtype), probe)

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        memory = self.empty(len(x), x.device, x.dtype) if memory is None else memory
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        q = q / math.sqrt(self.head_dim)
        if not x.numel():
            return q, memory
        context, past = context_of(memory.past, k, v, layout)
        plan = _Plan(context, self.given)
        probes = torch.cat([memory.probe[:, None].to(q.dtype), q], dim=1)
        chosen = self._search(probes.detach(), context, plan)
        out = self._attend(q, context, plan, chosen)
        rows = torch.arange(len(x), device=x.device)
        last = torch.from_numpy(plan.last_probe(layout)).to(x.device)
        return out, HipMemory(past, probes[rows, last.expand(len(x))])

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        """As many keys as may be found: how many of them are among the first ones, the text decides."""
        block, size, count = parameters.query_block, parameters.key_block, parameters.mask_size // parameters.key_block
        token = np.arange(length)
        blocks = np.maximum(token // block * block + 1 - parameters.window, 0) // size  # that may be chosen
        found = np.minimum(blocks * size, parameters.mask_size + parameters.sinks)
        seen = found + token + 1 - blocks * size
        halvings = np.ceil(np.log2(np.maximum(blocks / count, 1)))
        searched = halvings * 2 * parameters.mask_size / block  # once a block of queries
        return config.num_heads * config.head_size * float((2 * seen + searched).mean())

    @torch.no_grad()
    def _search(self, probes: Tensor, context: Context, plan: _Plan) -> Tensor:
        """int64 [B, H, n, mask_size / key_block]: for each of n blocks of queries, its key blocks by number, or -1."""
        given, size = self.given, self.given.key_block
        count = given.mask_size // size
        batch, heads = probes.shape[0], self.num_heads
        if not count:
            return torch.zeros(batch, heads, plan.probe.shape[1], 0, dtype=torch.int64, device=probes.device)
        keys = context.keys.transpose(1, 2)  # [B, G, S, d]
        per_group = heads // keys.shape[1]
        probe, blocks = (torch.from_numpy(table).to(probes.device) for table in (plan.probe, plan.blocks))
        rows = torch.arange(batch, device=probes.device)[:, None]
        q = probes[rows, probe.expand(batch, -1)].transpose(1, 2)  # [B, H, n, d]
        found = []
        step = max(1, SEARCH_NUMBERS // (batch * heads * 2 * count * size * self.head_dim))
        for first in range(0, q.shape[2], step):
            span = slice(first, first + step)
            groups = plan.groups[:, span].repeat(len(plan.probe), axis=0)

            def score(nodes: Tensor, span: slice = span, groups: np.ndarray = groups) -> Tensor:
                place = nodes[..., None] * size + torch.arange(size, device=nodes.device)
                number = plan.numbers(place, groups)
                grouped = number.unflatten(1, (-1, per_group)).flatten(2)
                gathered = keys.gather(2, grouped[..., None].expand(-1, -1, -1, keys.shape[-1]))
                gathered = gathered.view(*place.shape, -1)
                return (gathered * q[:, :, span, None, None]).sum(-1).amax(-1)

            visible = blocks[:, None, span].expand(batch, heads, -1)
            found.append(tree_search(score, visible, count))
        return torch.cat(found, dim=2)

    def _attend(self, q: Tensor, context: Context, plan: _Plan, chosen: Tensor) -> Tensor:
        """[B, L, H, e]; chosen: key blocks [B, H, n, m]."""
        length, block = q.shape[1], self.given.query_block
        if plan.aligned is not None:  # the queries of a block stand together: they share a list
            lists = plan.lists(chosen, plan.groups, plan.block_ends)
            mask = plan.causal(lists.shape[-1], plan.aligned + length).to(q.device)
            padded = torch.nn.functional.pad(q, (0, 0, 0, 0, plan.aligned, 0))
            out = ops.sparse_attention(padded, context.keys, context.values, mask, lists, block)
            return out[:, plan.aligned :]
        outputs = []
        step = max(1, ATTENTION_NUMBERS // (q.shape[0] * q.shape[2] * (self.given.mask_size + self.given.window)))
        for first in range(0, length, step):
            span = slice(first, first + step)
            lists = plan.lists(chosen, plan.group_of[:, span], context.query_position[:, span])
            outputs.append(ops.sparse_attention(q[:, span], context.keys, context.values, keys=lists))
        return torch.cat(outputs, dim=1)


class _Plan:
    """The blocks of queries of a batch, n a row, and where their keys stand. Tables have one row where all are alike.

    Attributes:
        probe: [b, n]; the query that searches, of the memory's (0) and the batch's (1 + token).
        blocks: [b, n]; key blocks older than the window, which may be chosen.
        group_of: [b, L]; the block of each query.
        aligned: how many queries of the first block were read before, in a plain batch; else None.
    """

    def __init__(self, context: Context, given: Hip.Parameters) -> None:
        self.given, self.size = given, context.keys.shape[1]
        document, position = context.query_document, context.query_position
        number = position // given.query_block
        begins = np.ones(position.shape, dtype=bool)
        begins[:, 1:] = (number[:, 1:] != number[:, :-1]) | (document[:, 1:] != document[:, :-1])
        self.group_of = begins.cumsum(axis=1) - 1
        count = int(self.group_of.max(initial=-1)) + 1
        row, token = np.nonzero(begins)
        where = (row, self.group_of[row, token])
        shape = (len(position), count)
        self.probe, self.first, self.below, self.move = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        starts = position[row, token] % given.query_block == 0
        self.probe[where] = np.where(starts, 1 + token, 0)
        self.first[where] = number[row, token] * given.query_block
        known = self.size - position.shape[1]
        read = (context.key_document[:, :known] == 0).sum(axis=1)  # of the first document, before this batch
        inside = document[row, token] > 0
        self.below[where] = np.where(inside, 0, read[row])
        self.move[where] = np.where(inside, known + token - position[row, token], known - read[row])
        self.blocks = np.maximum(self.first + 1 - given.window, 0) // given.key_block
        plain = len(position) == 1 and not document.any()
        self.aligned = int(position[0, 0] % given.query_block) if plain and known == position[0, 0] else None
        self.groups = np.arange(count)[None]
        self.block_ends = np.minimum(self.first + given.query_block, self.size) - 1

    def numbers(self, place: Tensor, groups: np.ndarray) -> Tensor:
        """Numbers of keys in their context, for places [B, H, m, ...] in the documents of groups [b, m]."""
        rows = np.arange(len(groups))[:, None]
        extra = (1,) * (place.ndim - 3)
        below, move = (
            torch.from_numpy(table[rows, groups]).to(place.device).view(len(groups), 1, groups.shape[1], *extra)
            for table in (self.below, self.move)
        )
        return torch.where(place < below, place, place + move).clamp(0, self.size - 1)

    def lists(self, chosen: Tensor, groups: np.ndarray, until: np.ndarray) -> Tensor:
        """int64 [B, H, m, K]: the keys of m lists, -1 for none: sinks, chosen blocks, and from their end until the
        last place, [b, m]."""
        given, device = self.given, chosen.device
        rows = np.arange(len(groups))[:, None]
        edge = torch.from_numpy(self.blocks[rows, groups] * given.key_block).to(device)[:, None, :, None]
        last = torch.from_numpy(until).to(device)[:, None, :, None]
        index = torch.from_numpy(groups).to(device)[:, None, :, None].expand(*chosen.shape[:2], -1, chosen.shape[3])
        blocks = chosen.gather(2, index)
        found = blocks[..., None] * given.key_block + torch.arange(given.key_block, device=device)
        found = found.masked_fill((blocks < 0)[..., None], -1).flatten(3)
        found = found.masked_fill(found < given.sinks, -1)
        sinks = torch.arange(given.sinks, device=device)
        sinks = torch.where(sinks < edge, sinks, -1)
        near = edge + torch.arange(self.local_width(), device=device)
        near = torch.where(near <= last, near, -1)
        whole = (*found.shape[:3], -1)
        place = torch.cat([sinks.expand(whole), found, near.expand(whole)], dim=-1)
        return torch.where(place < 0, place, self.numbers(place, groups))

    def local_width(self) -> int:
        """The most keys from the end of what may be chosen to the last query of a block."""
        return self.given.window + self.given.query_block + self.given.key_block

    def causal(self, width: int, queries: int) -> Tensor:
        """bool [1, 1, queries, K]: of the list of its block, what a query of a plain batch may see."""
        place = np.repeat(self.blocks[0] * self.given.key_block, self.given.query_block)[:queries, None]
        query = np.repeat(self.first[0], self.given.query_block) + np.tile(
            np.arange(self.given.query_block), self.first.shape[1]
        )
        near = place + np.arange(self.local_width()) <= query[:queries, None]
        mask = np.ones((queries, width), dtype=bool)
        mask[:, width - self.local_width() :] = near
        return torch.from_numpy(mask)[None, None]

    def last_probe(self, layout: Layout) -> np.ndarray:
        """int64 [b]: the query that began the block of each row's last token."""
        rows = np.arange(len(self.probe))
        last = np.maximum(layout.lengths[rows] - 1, 0)
        return np.where(layout.lengths[rows] > 0, self.probe[rows, self.group_of[rows, last]], 0)


def tree_search(score: Callable[[Tensor], Tensor], visible: Tensor, count: int) -> Tensor:
    """The search: nodes of equal size are halved, and the better half of all halves is kept, until they are blocks.

    Args:
        score: key blocks [..., m] -> how well the queries match them.
        visible: int64 [...]; how many blocks there are to choose from.
        count: how many to choose.

    Returns:
        int64 [..., count], rising; where fewer than `count` are visible, all of them and then -1.
    """
    number = torch.arange(count, device=visible.device)
    every = torch.where(number < visible[..., None], number, -1)
    many = visible > count
    if not bool(many.any()):
        return every
    edges = visible[..., None] * torch.arange(count + 1, device=visible.device) // count
    start, end = edges[..., :-1], edges[..., 1:]
    size = visible / count
    while bool((size > 1).any()):
        middle = (start + end) // 2
        starts, ends = torch.cat([start, middle], dim=-1), torch.cat([middle, end], dim=-1)
        values = score(starts).masked_fill(ends <= starts, -32000.0)
        best = values.topk(count, dim=-1).indices
        going = (size > 1)[..., None]
        start = torch.where(going, starts.gather(-1, best), start)
        end = torch.where(going, ends.gather(-1, best), end)
        size = size / 2
    return torch.where(many[..., None], start.sort(dim=-1).values, every)
