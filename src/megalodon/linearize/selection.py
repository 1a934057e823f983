"""Which layers keep their attention: those whose loss of it costs most.

The cost of a layer is what the teacher's predictions lose when this layer alone sees the last tokens and no others:
what lies beyond a window is what a constant memory holds worst, and this needs no training. All layers are measured in
one pass over the blocks: at each block a variant forks off, and from there all variants go on beside the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.convert.teachers import Teacher
from megalodon.data import Batch
from megalodon.files import write_text
from megalodon.linearize.activations import through
from megalodon.linearize.config import KeepSection
from megalodon.models.kin.block import NORMS
from megalodon.ops.layout import Layout, layout_of

LOGITS_AT_ONCE = 1 << 25


def kept_by_cost(
    keep: KeepSection, teacher: Teacher, file: Path, read: Callable[[], Batch], device: torch.device, dtype: torch.dtype
) -> list[int]:
    """The layers that keep their attention, by number; measured once, and written to `file`.

    Args:
        read: the rows to measure on.
    """
    if file.is_file():
        return list(json.loads(file.read_text(encoding="utf-8"))["kept"])
    batch = read()
    costs = replacement_costs(teacher, batch, keep.window, device, dtype)
    order = sorted(range(len(costs)), key=lambda layer: (-costs[layer], layer))
    kept = sorted(order[: keep.number(len(costs))])
    told = {"kept": kept, "window": keep.window, "tokens": batch.input_ids.numel(), "nats_a_token": costs}
    write_text(file, json.dumps(told, indent=1) + "\n")
    return kept


@torch.no_grad()
def replacement_costs(
    teacher: Teacher, batch: Batch, window: int, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """What each layer's attention costs when it sees the last `window` tokens alone.

    Memory: one block, and the batch's activations once for every layer before it and twice.

    Returns:
        KL(teacher || variant) of each layer, nats a token.
    """
    ids = batch.input_ids
    segments = None if batch.segment_ids is None else batch.segment_ids.to(device)
    layout = layout_of(ids.shape[0], ids.shape[1], device, segment_ids=segments)
    limited = teacher.with_attention("sliding_attention", {"window": window})
    embedding = teacher.tensor("model.embed_tokens.weight")
    whole = F.embedding(ids.to(embedding.device), embedding).to(device, dtype)
    variants: list[Tensor] = []
    for layer in range(teacher.config.num_layers):
        block = teacher.block(layer, device, dtype)
        variants = [through(block, x, layout) for x in variants]
        variants.append(through(limited.block(layer, device, dtype), whole, layout))
        whole = through(block, whole, layout)
    return _divergences(teacher, whole, variants, layout)


def _divergences(teacher: Teacher, whole: Tensor, variants: list[Tensor], layout: Layout) -> list[float]:
    tensors = {name: x.to(whole.device, whole.dtype) for name, x in teacher.other_tensors().items()}
    own = teacher.config
    norm = NORMS[own.norm](own.model_dim, own.norm_eps, device=whole.device, dtype=whole.dtype)
    norm.load_state_dict({name.rpartition(".")[2]: x for name, x in tensors.items() if ".final_norm." in name})
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    rows = max(1, LOGITS_AT_ONCE // len(head))

    def log_probabilities(x: Tensor) -> Tensor:
        return F.linear(norm(x), head, tensors.get("lm_head.bias")).float().log_softmax(-1)

    totals = [0.0] * len(variants)
    flat = [x.flatten(0, 1).split(rows) for x in (whole, *variants)]
    for theirs, *others in zip(*flat, strict=True):
        wanted = log_probabilities(theirs)
        for layer, x in enumerate(others):
            apart = F.kl_div(log_probabilities(x), wanted, log_target=True, reduction="sum")
            totals[layer] += float(apart)
    return [total / whole[..., 0].numel() for total in totals]
