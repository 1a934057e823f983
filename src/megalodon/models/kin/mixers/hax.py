"""HAX (arXiv 2507.00449): Mamba with attention to chosen keys beside the scan, both from the same convolved input.

Which keys a query sees may depend on its content: those in its bucket of a random hash, and those whose learned score
is highest. The published code takes statistics over all time for both, the future included. Here the hash has no mean
to take away (the sign of a projection does not ask for a norm), and what is scored is normalised over its features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Memory, NotNegativeFloat, Reference
from megalodon.models.kin.mixers.context import Context, context_of
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues
from megalodon.models.kin.mixers.mamba import Mamba, mamba_options
from megalodon.models.kin.mixers.state_space import ScanMemory
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout

SELECTIONS = {
    "lsh": "sign_bin_lsh",
    "key_selection": "key_selection",
    "window": "sliding_window",
    "sink": "sink",
    "dilated": "dilated",
}
"""Our name of a way to choose keys -> the authors'."""

STRIP_NUMBERS = 2**21
"""Entries of the tables of chosen keys that live at once."""


@dataclass(frozen=True)
class HaxMemory(Memory):
    """scan: Mamba's; past: keys, with their scores as a last feature, and values of all that was read; query_sum: [B,
    N], of the queries of the document."""

    scan: ScanMemory
    past: KeysAndValues
    query_sum: Tensor


class Chosen(NamedTuple):
    """What decides which keys a query sees. buckets of queries and keys: int64 [B, L] and [B, S]; scores: [B, S]."""

    query_bucket: Tensor | None
    key_bucket: Tensor | None
    score: Tensor | None


class _WithLoss(torch.autograd.Function):
    """y, and `weight` times a loss in what is differentiated, wherever y's gradient comes from."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        return dy, dy.new_full((), ctx.weight, dtype=torch.float32), None


class Hax(Mamba):
    """`k, q = split(Wqk x); a = sum over chosen keys of softmax(q . k / sqrt N) x; out = Wout ((scan + e a) silu z)`,
    x, z and the scan as in Mamba."""

    kind = "growing"

    class Parameters(Mamba.Parameters):
        """selection: ways to choose keys, of which each gets an equal share of `keys`: "lsh", "key_selection",
        "window", "sink", "dilated"; bits: of the hash; dilated_length: a dilated share reaches so far back;
        selection_loss: weight of the loss that trains the scores, added while training."""

        selection: list[str] = ["lsh", "key_selection"]  # noqa: RUF012
        keys: int = 64
        bits: int = 8
        dilated_length: int = 2048
        selection_loss: NotNegativeFloat = 0.1

        def check(self, config: KinConfig) -> None:
            super().check(config)
            for name in self.selection or [""]:
                if name not in SELECTIONS:
                    raise ValueError(f"hax: selection={self.selection}: it must name some of {', '.join(SELECTIONS)}")
            if self.keys < len(self.selection):
                raise ValueError(f"hax: keys={self.keys}: {len(self.selection)} ways to choose need one each at least")
            if not 1 <= self.bits <= 32:
                raise ValueError(f"hax: bits={self.bits}: it must be from 1 to 32")
            if self.dilated_length < self.keys:
                raise ValueError(f"hax: dilated_length={self.dilated_length}: it must be at least keys={self.keys}")

    hash: Tensor

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        self.given = parameters
        super().__init__(config, layer_index, parameters)
        self.share = parameters.keys // len(parameters.selection)
        width = self.state_size
        self.xx_proj = nn.Linear(self.inner, 2 * width, bias=False)
        self.E = nn.Parameter(torch.ones(self.inner))
        self.scores = "key_selection" in parameters.selection
        if self.scores:
            self.dx_proj_1 = nn.Linear(2 * width, 2 * width)
            self.dx_proj_2 = nn.Linear(2 * width, 2 * width)
            self.dx_proj_3 = nn.Linear(2 * width, 1)
        if "lsh" in parameters.selection:
            self.register_buffer("hash", torch.randn(width, parameters.bits))

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        super().initialise(std)
        if hasattr(self, "E"):
            init.ones_(self.E)
        if hasattr(self, "hash"):
            init.normal_(self.hash)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> HaxMemory:  # type: ignore[override]  # more than Mamba's
        past = KeysAndValues.empty(batch, 1, self.state_size + self.scores, self.inner, device, dtype)
        total = torch.zeros(batch, self.state_size, device=device, dtype=full_precision(dtype))
        return HaxMemory(super().empty(batch, device, dtype), past, total)

    def forward(  # type: ignore[override]  # its own memory
        self, u: Tensor, memory: HaxMemory | None, layout: Layout
    ) -> tuple[Tensor, HaxMemory]:
        memory = self.empty(len(u), u.device, u.dtype) if memory is None else memory
        x, z, recent = self.opened(u, memory.scan, layout)
        y, state = self.scanned(x, memory.scan, layout)
        k, q = self.xx_proj(x).chunk(2, dim=-1)
        k = k * self.state_size**-0.5
        sums, query_sum = self._query_sums(q, memory.query_sum, layout)
        score = self.score(k.detach(), F.normalize(sums.detach(), dim=-1)) if self.scores else None
        stored = k if score is None else torch.cat([k, score[..., None].detach().to(k.dtype)], dim=-1)
        context, past = context_of(memory.past, stored[:, :, None], x[:, :, None], layout)
        attended = self._attend(q, context)
        if score is not None and (self.training or torch.is_grad_enabled()):
            # it draws in training whether gradients are kept or, under checkpointing, made again later;
            # outside training the scores learn nothing, but their gradient is 0, not missing
            loss = self.selection_loss(score, k.detach(), q.detach(), layout) if self.training else 0 * score.sum()
            attended = _WithLoss.apply(attended, loss, self.given.selection_loss)
        out = self.out_proj((y + self.E * attended) * F.silu(z))
        return out, HaxMemory(ScanMemory(recent, state), past, query_sum)

    def score(self, k: Tensor, summary: Tensor) -> Tensor:
        """How much each key deserves to be seen, [B, L], from it and what was asked until then, [B, L, N] both."""
        hidden = F.relu(self.dx_proj_1(torch.cat([k, summary.to(k.dtype)], dim=-1)))
        return self.dx_proj_3(F.relu(self.dx_proj_2(hidden)))[..., 0].to(full_precision(k.dtype))

    def _query_sums(self, q: Tensor, before: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """(the sum of each document's queries until each token [B, L, N], that after each row's last token [B, N])."""
        wide = q.detach().to(before.dtype)
        if layout.padding is not None:
            wide = wide.masked_fill(layout.padding[..., None], 0)
        running = F.pad(wide.double().cumsum(1), (0, 0, 1, 0))
        rows = torch.arange(len(q), device=q.device)[:, None]
        start = torch.from_numpy(layout.document_start).to(q.device)
        sums = running[:, 1:] - running[rows, start] + (start == 0)[..., None] * before[:, None]
        sums = sums.to(before.dtype)
        if not q.shape[1]:
            return sums, before
        last = torch.from_numpy((layout.lengths - 1).clip(0)).to(q.device)
        empty = torch.from_numpy(layout.lengths == 0).to(q.device)
        return sums, torch.where(empty[:, None], before, sums[rows[:, 0], last])

    def _attend(self, q: Tensor, context: Context) -> Tensor:
        """[B, L, E]: the attention of the queries [B, L, N] to the keys chosen for each, strip by strip."""
        keys = context.keys[..., : self.state_size]
        chosen = self.chosen(q, context)
        strips, step = [], max(1, STRIP_NUMBERS // max(1, keys.shape[0] * keys.shape[1]))
        for first in range(0, q.shape[1], step):
            span = slice(first, first + step)
            mask = self.mask(chosen, context, span)
            strips.append(ops.sparse_attention(q[:, span, None], keys, context.values, mask[:, None])[:, :, 0])
        return torch.cat(strips, dim=1) if strips else context.values[:, :0, 0]

    @torch.no_grad()
    def chosen(self, q: Tensor, context: Context) -> Chosen:
        """What decides, for queries [B, L, N] and all keys of their context."""
        keys = context.keys[:, :, 0]
        score = keys[..., -1] if self.scores else None
        if "lsh" not in self.given.selection:
            return Chosen(None, None, score)
        return Chosen(self.bucket(q), self.bucket(keys[..., : self.state_size]), score)

    def bucket(self, x: Tensor) -> Tensor:
        """The number of the bucket of each vector: the signs of its projections, as bits."""
        bits = (x.to(full_precision(x.dtype)) @ self.hash.to(full_precision(x.dtype))) > 0
        return (bits * (2 ** torch.arange(self.given.bits, device=x.device))).sum(-1)

    @torch.no_grad()
    def mask(self, chosen: Chosen, context: Context, span: slice) -> Tensor:
        """bool [B or 1, l, S]: which keys the queries of a strip see."""
        key_document, key_position, query_document, query_position = context.on_device()
        query_document, query_position = query_document[:, span, None], query_position[:, span, None]
        key_document, key_position = key_document[:, None], key_position[:, None]
        allowed = (key_document == query_document) & (key_position <= query_position)
        seen = torch.zeros_like(allowed)
        for name in self.given.selection:
            if name == "window":
                seen = seen | (key_position > query_position - self.share)
            elif name == "sink":
                seen = seen | (key_position < self.share)
            elif name == "dilated":
                stride = self.given.dilated_length // self.share
                seen = seen | (key_position % stride == stride - 1)
            elif name == "lsh":
                assert chosen.query_bucket is not None and chosen.key_bucket is not None
                seen = seen | latest(
                    allowed & (chosen.query_bucket[:, span, None] == chosen.key_bucket[:, None]), self.share
                )
            else:
                assert chosen.score is not None
                seen = seen | highest(chosen.score, allowed, self.share)
        return seen & allowed

    def selection_loss(
        self, score: Tensor, k: Tensor, q: Tensor, layout: Layout, noise: Tensor | None = None
    ) -> Tensor:
        """How far the scores [B, L] are from ranking keys by the attention that they would get from all later queries.

        Compares pairs of as many tokens as a way to choose may name, drawn by `noise` [B, L] (None: uniform): the
        logistic loss of their differences.
        """
        noise = torch.rand(score.shape, device=score.device) if noise is None else noise.clone()
        if layout.padding is not None:
            noise = noise.masked_fill(layout.padding, -1.0)
        count = min(self.share, int(layout.lengths.min(initial=score.shape[1])))
        if count == 0:
            return score.sum() * 0
        drawn = noise.topk(count, dim=-1).indices
        rows = torch.arange(len(score), device=score.device)[:, None]
        document = torch.from_numpy(layout.document_start).to(score.device)
        later = torch.arange(score.shape[1], device=score.device) >= drawn[..., None]
        later &= document[:, None] == document[rows, drawn][..., None]
        if layout.padding is not None:
            later &= ~layout.padding[:, None]
        target = (torch.sigmoid(k[rows, drawn] @ q.mT) * later).sum(-1)
        apart = target[..., :, None] - target[..., None, :]
        wanted = (apart.sign() + 1) / 2
        chosen = score[rows, drawn]
        return F.binary_cross_entropy_with_logits(chosen[..., :, None] - chosen[..., None, :], wanted.to(chosen.dtype))

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        """As many keys as may be chosen: how often two ways choose the same one, the text decides."""
        read, share = np.arange(1, length + 1), parameters.keys // len(parameters.selection)
        stride = parameters.dilated_length // share
        counts = [read // stride if way == "dilated" else np.minimum(read, share) for way in parameters.selection]
        seen = np.minimum(sum(counts), read).mean()
        hashes = 2.0 * parameters.bits * parameters.state_size * ("lsh" in parameters.selection)
        return hashes + (parameters.state_size + parameters.expand * config.model_dim) * float(seen)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' Mamba mixer with sparse attention. `config["sparse_arch"]` joins the ways to choose by "+"; the
        hash, which their code draws at every call, may stand among the parameters as `hash`."""
        names = {theirs: ours for ours, theirs in SELECTIONS.items()}
        parts = config.get("sparse_arch", "sign_bin_lsh+key_selection").split("+")
        for part in parts:
            if part not in names:
                raise ValueError(f"hax: sparse_arch has {part!r}, which is not reproduced: it must be of {list(names)}")
        fields, parameters = mamba_options(config)
        parameters |= {"selection": [names[part] for part in parts], "keys": config["keys"], "bits": config["bits"]}
        parameters["dilated_length"] = config.get("maxlen", 2048)
        ours = dict(tensors)
        if "sign_bin_lsh" in parts and "hash" not in ours:
            ours["hash"] = torch.randn(parameters["state_size"], config["bits"])
        return Reference(fields, parameters, ours)


def latest(candidates: Tensor, count: int) -> Tensor:
    """Of the candidates of each query, bool [..., S], the last `count`."""
    from_the_end = candidates.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return candidates & (from_the_end <= count)


def highest(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Of the allowed keys of each query, bool [B or 1, l, S], those with the `count` highest scores [B, S]."""
    masked = torch.where(allowed, score[:, None], -torch.inf)
    best = masked.topk(min(count, masked.shape[-1]), dim=-1).indices
    return torch.zeros_like(masked, dtype=torch.bool).scatter_(-1, best, True) & allowed
