"""The shape of a Gecko model: a Transformers config with the paper's names, and the published size by name."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
from typing import Any

from megalodon.models.config import architecture_config
from megalodon.models.gated_attention_config import GatedAttentionConfig

PRESETS: dict[str, dict[str, Any]] = {
    "gecko-7b": {
        "vocab_size": 32000,
        "num_layers": 32,
        "model_dim": 4096,
        "z_dim": 1024,
        "value_dim": 8192,
        "num_heads": 4,
        "ffn_hidden_dim": 8192,
        "cema_ndim": 16,
        "chunk_size": 2048,
        "norm_num_groups": 64,
    },
}
"""The reference's defaults (GECKO: presets)."""


@architecture_config
class GeckoConfig(GatedAttentionConfig):
    """Configuration of a Gecko model (arXiv 2601.06463). Keyword arguments only; names are those of Megalodon's config.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of blocks (alias `num_hidden_layers`).
        model_dim: D, the width of the residual stream (alias `hidden_size`).
        z_dim: Z, the width of the shared query and key representation, all heads together.
        value_dim: V, the width of the values, all heads together.
        num_heads: H (alias `num_attention_heads`); divides z_dim and value_dim.
        ffn_hidden_dim: F, the hidden width of the feed-forward layer (alias `intermediate_size`).
        cema_ndim: N, complex components of the moving average per channel.
        chunk_size: C, tokens in an attention chunk; a token sees its own and the one before.
        norm_num_groups: G, groups of TimestepDecayNorm; divides model_dim and is smaller.
        norm_beta1, norm_beta2: decay of its mean and of its variance for each token.
        layernorm_num_groups: groups of RMSNorm and LayerNorm; divides model_dim.
        norm_eps: added to variances and mean squares.
        norm_affine: whether RMSNorm and LayerNorm have scales (and biases). TimestepDecayNorm always has both.
        rope_base: base of the rotary embedding's wavelengths.
        num_rope_heads: how many of the heads, the first ones, are rotated. None: all; 0: none.
        two_hop_residual: the second residual adds the block's input, as Megalodon's does, in place of the first's sum.
        swiglu: gated feed-forward layer with three matrices in place of two.
        rescale_nffn: learn a scale of the feed-forward residual, initially 0.1 * 0.5**layer.
        scale_emb: multiply embeddings by sqrt(model_dim).
        share_emb: tie the output matrix to the embedding (alias `tie_word_embeddings`).
        output_size: rows of the output matrix. None: vocab_size.
        multi_segments: BOS tokens (`bos_token_id`) cut a sequence into segments of which none sees another, while its
            chunks go on: the meaning of the authors' code. Documents told by `segment_ids` start chunks afresh.
        dropout: of embeddings and residual branches. hidden_dropout: inside the block. attention_dropout: of attention.
        attention_dropout_mode: "softmax" drops weights after the softmax, "dropkey" drops keys before it.
        init_mode: of linear layers: "he", "bert", "xavier", "gaussian", or "none" for PyTorch's own.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or is out of range, or sizes do not divide; the message
            names the field.
    """

    model_type = "gecko"
    presets = PRESETS
    identity_fields = (
        *("vocab_size", "num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim"),
        *("chunk_size", "norm_num_groups", "norm_beta1", "norm_beta2", "layernorm_num_groups", "norm_eps"),
        *("norm_affine", "rope_base", "num_rope_heads", "two_hop_residual", "swiglu", "rescale_nffn", "scale_emb"),
        *("share_emb", "output_size", "multi_segments", "bos_token_id"),
    )
    free_in_fine_tuning = (
        *("chunk_size", "rope_base", "num_rope_heads", "norm_beta1", "norm_beta2", "multi_segments", "bos_token_id"),
        *("dropout", "hidden_dropout", "attention_dropout", "attention_dropout_mode"),
    )
    chunks_before = 1

    norm_beta1: float = 0.999
    norm_beta2: float = 0.9999
    layernorm_num_groups: int = 1
    rope_base: float | int = 500000.0
    num_rope_heads: int | None = None
    two_hop_residual: bool = False
    swiglu: bool = True
    multi_segments: bool = False

    def validate_architecture(self) -> None:
        """Check that the sizes make a model; called on construction."""
        super().validate_architecture()
        self.require_positive(("layernorm_num_groups",))
        self.require_divisible(("model_dim", "layernorm_num_groups"))
        if self.norm_num_groups >= self.model_dim:
            raise ValueError(
                f"norm_num_groups={self.norm_num_groups}: it must be smaller than model_dim={self.model_dim}, "
                "because a group of one feature has no variance"
            )
        for name in ("norm_beta1", "norm_beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must lie between 0 and 1")
        if self.num_rope_heads is not None and not 0 <= self.num_rope_heads <= self.num_heads:
            raise ValueError(
                f"num_rope_heads={self.num_rope_heads}: it must be None for all, or lie in 0 to "
                f"num_heads={self.num_heads}"
            )
        if self.head_dim % 2 and self.rotated_heads:
            raise ValueError(f"z_dim / num_heads = {self.head_dim}: rotary embeddings need it even")
        if self.multi_segments and self.bos_token_id is None:
            raise ValueError("multi_segments=True needs bos_token_id: segments begin at BOS tokens")
        if self.multi_segments and not 0 <= (self.bos_token_id or 0) < self.vocab_size:
            raise ValueError(
                f"bos_token_id={self.bos_token_id}: with multi_segments=True it must be a token, "
                f"0 to vocab_size - 1 = {self.vocab_size - 1}"
            )

    @property
    def tensor_fields(self) -> tuple[str, ...]:  # type: ignore[override]  # of a class attribute, by the groups of norms
        own = ("num_heads", "norm_num_groups", "model_dim", "ffn_hidden_dim")
        return (*own, "layernorm_num_groups") if self.layernorm_num_groups > 1 else own

    @property
    def chunk_axis(self) -> bool:  # type: ignore[override]  # of a class attribute: BOS tokens are not known across ranks
        return not self.multi_segments

    def span_summary_bytes(self) -> float:
        norm, average = 2 * self.norm_num_groups * 8, self.model_dim * self.cema_ndim * 8
        dim, width = self.head_dim, self.value_head_dim
        return norm + average + 4 * self.num_heads * dim * (dim + width + 1)  # and what a span does to the memory

    def sequence_multiply_adds(self, length: int) -> float:
        chunk = min(self.chunk_size, length)
        keys = chunk / 2 + chunk * (1 - chunk / length)
        reading = max(1 - 2 * self.chunk_size / length, 0)
        memory = 2 * reading * self.head_dim * self.value_dim  # absorbing and reading
        return self.num_layers * (keys * (self.z_dim + self.value_dim) + memory)

    @property
    def rotated_heads(self) -> int:
        """How many heads are rotated."""
        return self.num_heads if self.num_rope_heads is None else self.num_rope_heads
