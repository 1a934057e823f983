"""Bytes that each rank sends in a step, by axis, and how many collectives they take: formulas of what the code sends.

A ring all-gather or reduce-scatter of n ranks sends (n - 1) / n of the whole from each rank, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalodon.models.megalodon.config import MegalodonConfig
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


def block_parameters(config: MegalodonConfig) -> tuple[int, int]:
    """Parameters of a block: (in the matrices and biases of linear layers, elsewhere)."""
    dim, z, value, hidden = config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim
    linear = (
        dim * (z + 2 * value + dim) + z + 2 * value + dim + value * dim + (3 if config.swiglu else 2) * dim * hidden
    )
    other = 2 * dim + 2 * config.norm_num_groups * (config.norm_prior_count > 0) + 4 * z
    other += dim * (4 * config.cema_ndim + 2) + 3 * dim * config.norm_affine + dim * config.rescale_nffn
    return linear, other


def end_parameters(config: MegalodonConfig) -> tuple[int, int]:
    """Parameters of the embedding, and of the final norm with the head (counted in the first where they are tied)."""
    table, out = config.vocab_size * config.model_dim, (config.output_size or config.vocab_size) * config.model_dim
    norm = 2 * config.model_dim + 2 * config.norm_num_groups * (config.norm_prior_count > 0)
    return table, norm + (0 if config.share_emb else out)


def stage_parameters(config: MegalodonConfig, layers: int, first: bool, last: bool) -> tuple[int, int]:
    """Parameters of a stage: (in its blocks, in the embedding, final norm and head that it has)."""
    table, end = end_parameters(config)
    copy = table if config.share_emb and last and not first else 0  # a pipeline's two ends each have the one matrix
    return layers * sum(block_parameters(config)), table * first + end * last + copy


def weights_traffic(
    config: MegalodonConfig, sizes: MeshSizes, step: Step, layers: int, first: bool, last: bool
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


def tensor_traffic(
    config: MegalodonConfig, sizes: MeshSizes, step: Step, layers: int, first: bool, last: bool
) -> Traffic:
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


def chunk_traffic(config: MegalodonConfig, sizes: MeshSizes, step: Step, layers: int, last: bool) -> Traffic:
    """The summaries of two memories a layer, whatever the length; none for attention where spans are whole chunks."""
    ranks = sizes.chunk
    if ranks == 1:
        return Traffic()
    passes = 3 if step.checkpointing else 2
    norm = step.rows * 2 * config.norm_num_groups / sizes.tensor * 8
    cema = step.rows * config.model_dim / sizes.tensor * config.cema_ndim * 8
    sent = (ranks - 1) * (layers * passes * (norm + cema) + last * 2 * norm)
    return Traffic(sent * step.parts, step.parts * (2 * layers * passes + 2 * last))


def pipeline_traffic(
    config: MegalodonConfig, sizes: MeshSizes, step: Step, first: bool = False, last: bool = False
) -> Traffic:
    """The residual stream, in float32, to the next stage and its gradients to the one before, of a rank with one stage;
    and between the ends the gradient of a matrix that both have."""
    if sizes.pipeline == 1:
        return Traffic()
    message = step.tokens(sizes) * config.model_dim / sizes.tensor * 4
    ways = (not first) + (not last)
    tied = end_parameters(config)[0] * 4 / sizes.tensor / sizes.shard / sizes.chunk
    shared = config.share_emb and (first or last)
    return Traffic(ways * message * step.parts + shared * tied, ways * step.parts + shared)
