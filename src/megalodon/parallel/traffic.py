"""Bytes that each rank sends in a step, by axis, and how many collectives they take: formulas of what the code sends.

A ring all-gather or reduce-scatter of n ranks sends (n - 1) / n of the whole from each rank, an all-reduce twice that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from megalodon.models import Config, build_model
from megalodon.parallel.mesh import MeshSizes


@dataclass(frozen=True)
class Step:
    """What a step computes on one rank.

    Attributes:
        rows: of one micro-batch on one rank. parts: micro-batches. length: tokens of a whole row.
        bytes_: of an element of activations (2 for bfloat16, 4 for float32).
        checkpointing: whether blocks are computed twice.
    """

    rows: int
    parts: int
    length: int
    bytes_: int
    checkpointing: bool

    def tokens(self, sizes: MeshSizes) -> float:
        """Of one micro-batch on one rank."""
        return self.rows * self.length / sizes.chunk


@dataclass(frozen=True)
class Traffic:
    """What one rank sends along an axis in a step: bytes, and collectives or messages one after another."""

    bytes_: float = 0.0
    count: float = 0.0


@dataclass(frozen=True)
class Counted:
    """Parameters of a model, by what becomes of them.

    Attributes:
        linear: of a block, in the matrices and biases of linear layers. other: of a block, elsewhere.
        table: of the embedding. end: of the final norm and the head (without the head where it is the embedding).
    """

    linear: int
    other: int
    table: int
    end: int


@cache
def _counted(kind: Any, fields: str) -> Counted:
    """Of a model of one layer that has shapes and no values."""
    with torch.device("meta"):
        model = build_model(kind(**{**json.loads(fields), "num_layers": 1}))
    (block,) = model.model.layers
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    linear = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    whole = sum(parameter.numel() for parameter in block.parameters())
    table = model.model.embed_tokens.weight.numel()
    norm = sum(parameter.numel() for parameter in model.model.final_norm.parameters())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return Counted(linear, whole - linear, table, norm + (0 if tied else model.lm_head.weight.numel()))


def counted(config: Config) -> Counted:
    """The parameters of a model of this config."""
    fields = {name: getattr(config, name) for name in config.architecture_fields()}
    kind: Any = type(config)
    return _counted(kind, json.dumps(fields))


def block_parameters(config: Config) -> tuple[int, int]:
    """Parameters of a block: (in the matrices and biases of linear layers, elsewhere)."""
    return counted(config).linear, counted(config).other


def end_parameters(config: Config) -> tuple[int, int]:
    """Parameters of the embedding, and of the final norm with the head (counted in the first where they are tied)."""
    return counted(config).table, counted(config).end


def stage_parameters(config: Config, layers: int, first: bool, last: bool) -> tuple[int, int]:
    """Parameters of a stage: (in its blocks, in the embedding, final norm and head that it has)."""
    table, end = end_parameters(config)
    copy = table if config.share_emb and last and not first else 0  # a pipeline's two ends each have the one matrix
    return layers * sum(block_parameters(config)), table * first + end * last + copy


def weights_traffic(
    config: Config, sizes: MeshSizes, step: Step, layers: int, first: bool, last: bool
) -> dict[str, Traffic]:
    """FSDP2: weights gathered for each pass of a micro-batch (in a pipeline once a step), gradients scattered once,
    shards summed over copies."""
    ranks = sizes.shard * sizes.chunk
    linear, other = block_parameters(config)
    block = (linear * step.bytes_ + other * 4) * layers / sizes.tensor
    blocks, ends = stage_parameters(config, layers, first, last)
    parameters = (blocks + ends) / sizes.tensor
    part = (ranks - 1) / ranks
    # The outermost weights stay whole from the forward to the backward pass.
    passes, parts = (1, 1) if sizes.pipeline > 1 else (2, step.parts)
    gathered = (passes * block + 4 * ends / sizes.tensor) * parts if ranks > 1 else 0.0
    groups = 1 + layers * (2 if step.bytes_ == 2 else 1)
    shard = Traffic(part * (gathered + parameters * 4), (ranks > 1) * groups * (passes * parts + 1))
    copies = sizes.replicate
    replicate = Traffic(2 * (copies - 1) / copies * parameters * 4 / ranks, (copies > 1) * groups)
    return {"shard": shard, "replicate": replicate}


def tensor_traffic(config: Config, sizes: MeshSizes, step: Step, layers: int, first: bool, last: bool) -> Traffic:
    """Vectors gathered before projections and scattered after; two numbers a token for norms; the split loss."""
    ranks = sizes.tensor
    if ranks == 1:
        return Traffic()
    part = (ranks - 1) / ranks
    tokens = step.tokens(sizes)
    passes = 3 if step.checkpointing else 2
    vectors = (5 * layers * passes + 2 * last) * step.bytes_ + 2 * first * 4  # embeddings are float32
    # An all-gather of one or two float32 a token from each rank, and its adjoint.
    norms = (4 + 8) * layers * passes * ranks
    loss = 2 * (4 + 8) * last
    sent = part * tokens * (vectors * config.model_dim + norms + loss)
    return Traffic(sent * step.parts, step.parts * (7 * layers * passes + 2 * first + 4 * last))


def chunk_traffic(config: Config, sizes: MeshSizes, step: Step, layers: int, last: bool) -> Traffic:
    """The summaries of two memories a layer, whatever the length; none for attention where spans are whole chunks."""
    ranks = sizes.chunk
    if ranks == 1:
        return Traffic()
    passes = 3 if step.checkpointing else 2
    norm = step.rows * 2 * config.norm_num_groups / sizes.tensor * 8
    summary = step.rows * config.span_summary_bytes() / sizes.tensor
    sent = (ranks - 1) * (layers * passes * summary + last * 2 * norm)
    return Traffic(sent * step.parts, step.parts * (2 * layers * passes + 2 * last))


def pipeline_traffic(config: Config, sizes: MeshSizes, step: Step, first: bool = False, last: bool = False) -> Traffic:
    """The residual stream, in float32, to the next stage and its gradients to the one before, of a rank with one stage;
    and between the ends the gradient of a matrix that both have."""
    if sizes.pipeline == 1:
        return Traffic()
    message = step.tokens(sizes) * config.model_dim / sizes.tensor * 4
    ways = (not first) + (not last)
    tied = end_parameters(config)[0] * 4 / sizes.tensor / sizes.shard / sizes.chunk
    shared = config.share_emb and (first or last)
    return Traffic(ways * message * step.parts + shared * tied, ways * step.parts + shared)
