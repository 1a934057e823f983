"""What the configs of Megalodon and Gecko share: the sizes of a block of CEMA, gated attention and feed-forward."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from megalodon.models.config import Config


@strict
class GatedAttentionConfig(Config):
    """The common fields, which each architecture's config describes among its own, and what follows from them."""

    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
        "tie_word_embeddings": "share_emb",
    }
    width_fields: ClassVar[dict[str, int]] = {
        "model_dim": 64,
        "z_dim": 32,
        "value_dim": 128,
        "ffn_hidden_dim": 128,
        "norm_num_groups": 8,
        "cema_ndim": 4,
    }
    calibration_fields: ClassVar[dict[str, Any]] = {"num_heads": 1, "vocab_size": 64, "chunk_size": 512}

    vocab_size: int = 32000
    num_layers: int = 12
    model_dim: int = 1024
    z_dim: int = 256
    value_dim: int = 2048
    num_heads: int = 1
    ffn_hidden_dim: int = 2560
    cema_ndim: int = 16
    chunk_size: int = 2048
    norm_num_groups: int = 32
    norm_eps: float | int = 1e-5
    norm_affine: bool = True
    rope_base: float | int = 10000.0
    swiglu: bool = False
    rescale_nffn: bool = False
    scale_emb: bool = False
    share_emb: bool = False
    output_size: int | None = None
    dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    attention_dropout_mode: Literal["softmax", "dropkey"] = "softmax"
    init_mode: Literal["he", "bert", "xavier", "gaussian", "none"] = "he"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def validate_architecture(self) -> None:
        """Check that the sizes make a model; called on construction."""
        super().validate_architecture()
        self.require_positive(("vocab_size", "num_layers", *self.width_fields, "num_heads", "chunk_size"))
        self.require_divisible(("z_dim", "num_heads"), ("value_dim", "num_heads"), ("model_dim", "norm_num_groups"))
        self.require_probabilities("dropout", "hidden_dropout", "attention_dropout")
        self.require_positive_finite("norm_eps", "rope_base")
        self.require_output_size()

    @property
    def head_dim(self) -> int:
        """Size of a query and key head, Z / H."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """Size of a value head, V / H."""
        return self.value_dim // self.num_heads
