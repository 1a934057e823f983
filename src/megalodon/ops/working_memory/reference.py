"""The working memory by its definition: chunks are absorbed one by one, and tokens read one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout
from megalodon.ops.prefix import Prefix
from megalodon.ops.segments import Segments


def absorbed(memory: Tensor, log_mass: Tensor, k: Tensor, v: Tensor, bos: Tensor) -> tuple[Tensor, Tensor]:
    """The memory [H, d, e] and its log mass [H, d] after a chunk k [C, H, d], v [C, H, e] with BOS flags [C]."""
    if bos.any():  # the document ended: forget
        memory, log_mass = torch.zeros_like(memory), torch.full_like(log_mass, -torch.inf)
    last = int(bos.nonzero().max()) if bos.any() else 0
    live = torch.arange(len(bos), device=bos.device) >= last
    k, v = k.to(memory.dtype).transpose(0, 1), v.to(memory.dtype).transpose(0, 1)
    address = k.softmax(-1)
    alive = k.masked_fill(~live[:, None], -torch.inf)
    share, own = alive.softmax(1), alive.logsumexp(1)
    total = torch.logaddexp(log_mass, own)
    rate = torch.exp(own - total)[..., None]
    return memory + rate * (share.mT @ (v - address @ memory) - memory), total


def working_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    use_cache: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon.ops.working_memory`."""
    size = layout.chunk_size
    assert size is not None
    rows = [_row(b, q, k, v, memory[b], log_mass[b], prefix, layout, segments, size) for b in range(layout.batch)]
    y, memories, masses = zip(*rows, strict=True)
    return torch.stack(y).to(v.dtype), torch.stack(memories), torch.stack(masses)


def _row(
    b: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    log_mass: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    seen = int(layout.positions[b])
    keys, values, kept = prefix.of_row(b, seen, size, k, v)
    bos = torch.zeros(len(keys), dtype=torch.bool, device=k.device)
    if segments is not None:
        bos[kept:] = segments.bos[b]
        before, open_ = int(segments.before[b]), int(segments.open[b])
        if before >= 0 and seen >= size:
            bos[before] = True
        if open_ >= 0 and seen % size:
            bos[kept - seen % size + open_] = True
    shift = kept  # the token at place `at` of the frame has position `at - shift + seen` in its document
    outputs = []
    for t in range(layout.length):
        if t >= int(layout.lengths[b]):
            outputs.append(torch.zeros_like(v[b, t]).to(memory.dtype))
            continue
        if layout.starts is not None and layout.starts[b, t]:
            memory, log_mass = torch.zeros_like(memory), torch.full_like(log_mass, -torch.inf)
            seen, shift = 0, kept + t
        position = kept + t - shift + seen
        chunk, begin = position // size, kept + t - position % size  # where the chunk begins in the frame
        read = torch.einsum("hd,hde->he", q[b, t].to(memory.dtype).softmax(-1), memory)
        hidden = chunk < 2 or bool(bos[begin - size : kept + t + 1].any())
        outputs.append(torch.zeros_like(read) if hidden else read)
        if (position + 1) % size == 0 and chunk > 0:
            full = slice(begin - size, begin)
            memory, log_mass = absorbed(memory, log_mass, keys[full], values[full], bos[full])
    y = torch.stack(outputs) if outputs else v[b].to(memory.dtype)
    return y, memory, log_mass
