"""The shape of a Megalodon model: a Transformers config with the paper's names, and the published sizes by name."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
from typing import Any

from megalodon.models.config import architecture_config
from megalodon.models.gated_attention_config import GatedAttentionConfig

_COMMON: dict[str, Any] = {"vocab_size": 32000, "cema_ndim": 16, "chunk_size": 2048, "norm_num_groups": 64}
_1_3B = {**_COMMON, "num_layers": 24, "model_dim": 2048, "z_dim": 512, "value_dim": 4096, "num_heads": 2}
_7B = {**_COMMON, "num_layers": 32, "model_dim": 4096, "z_dim": 1024, "value_dim": 8192, "num_heads": 4}

PRESETS: dict[str, dict[str, Any]] = {
    "200m": {
        **_COMMON,
        "num_layers": 12,
        "model_dim": 1024,
        "z_dim": 256,
        "value_dim": 2048,
        "num_heads": 1,
        "ffn_hidden_dim": 2560,
        "norm_num_groups": 32,
    },
    "1.3b": {**_1_3B, "ffn_hidden_dim": 4864},
    "1.3b-pg19": {**_1_3B, "ffn_hidden_dim": 3584, "swiglu": True, "share_emb": True, "scale_emb": True},
    "7.1b": {**_7B, "ffn_hidden_dim": 11264},
    "7.3b": {**_7B, "ffn_hidden_dim": 8192, "swiglu": True},
    "paper-7b": {**_7B, "ffn_hidden_dim": 8192, "swiglu": True, "chunk_size": 4096, "rope_base": 100000.0},
}
"""The reference's sizes and the paper's 7B (SPEC: Presets)."""


@architecture_config
class MegalodonConfig(GatedAttentionConfig):
    """Configuration of a Megalodon model (arXiv 2404.08801). Keyword arguments only; defaults are the 200m preset.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of blocks (alias `num_hidden_layers`).
        model_dim: D, the width of the residual stream (alias `hidden_size`).
        z_dim: Z, the width of the shared query and key representation, all heads together.
        value_dim: V, the width of the values, all heads together.
        num_heads: H (alias `num_attention_heads`); divides z_dim and value_dim.
        ffn_hidden_dim: F, the hidden width of the feed-forward layer (alias `intermediate_size`).
        cema_ndim: N, complex components of the moving average per channel.
        chunk_size: C, tokens in an attention chunk.
        norm_num_groups: G, groups of TimestepNorm; divides model_dim. model_dim itself needs norm_prior_count > 1.
        norm_eps: added to variances and mean squares.
        norm_affine: whether RMSNorm and LayerNorm have scales (and biases). TimestepNorm always has both.
        norm_prior_count: imagined tokens before the first; when positive, their mean and log-variance are parameters.
        rope_base: base of the rotary embedding's wavelengths.
        swiglu: gated feed-forward layer with three matrices in place of two.
        rescale_nffn: learn a scale of the feed-forward residual, initially 0.1 * 0.5**layer.
        scale_emb: multiply embeddings by sqrt(model_dim).
        share_emb: tie the output matrix to the embedding (alias `tie_word_embeddings`).
        output_size: rows of the output matrix. None: vocab_size.
        dropout: of embeddings and residual branches. hidden_dropout: inside the block. attention_dropout: of attention.
        attention_dropout_mode: "softmax" drops weights after the softmax, "dropkey" drops keys before it.
        init_mode: of linear layers: "he", "bert", "xavier", "gaussian", or "none" for PyTorch's own.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or is out of range, or sizes do not divide; the message
            names the field.
    """

    model_type = "megalodon"
    presets = PRESETS
    identity_fields = (
        *("vocab_size", "num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim"),
        *("chunk_size", "norm_num_groups", "norm_eps", "norm_affine", "norm_prior_count", "rope_base", "swiglu"),
        *("rescale_nffn", "scale_emb", "share_emb", "output_size"),
    )
    free_in_fine_tuning = (
        *("chunk_size", "rope_base"),
        *("dropout", "hidden_dropout", "attention_dropout", "attention_dropout_mode"),
    )
    tensor_fields = ("num_heads", "norm_num_groups", "model_dim", "ffn_hidden_dim")
    chunk_axis = True

    norm_prior_count: int = 0

    def validate_architecture(self) -> None:
        """Check that the sizes make a model; called on construction."""
        super().validate_architecture()
        if self.head_dim % 2:
            raise ValueError(f"z_dim / num_heads = {self.head_dim}: rotary embeddings need it even")
        if self.norm_prior_count < 0:
            raise ValueError(f"norm_prior_count={self.norm_prior_count}: it must not be negative")
        if self.norm_num_groups == self.model_dim and self.norm_prior_count < 2:
            raise ValueError("norm_num_groups = model_dim (a featurewise norm) needs norm_prior_count of at least 2")

    def sequence_multiply_adds(self, length: int) -> float:
        return self.num_layers * min(self.chunk_size, length) / 2 * (self.z_dim + self.value_dim)

    def span_summary_bytes(self) -> float:
        return 2 * self.norm_num_groups * 8 + self.model_dim * self.cema_ndim * 8  # the norm's moments, CEMA's h
