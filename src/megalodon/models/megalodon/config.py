"""The shape of a Megalodon model: a Transformers config with the paper's names, and the published sizes by name."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import functools
import math
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig

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

_OTHER_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "is_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "torch_dtype",
    }
)
"""Keys that Transformers passes or saves although no config has a field for them."""


def _checked(cls: type["MegalodonConfig"]) -> type["MegalodonConfig"]:
    """Make construction refuse unknown keys, which Transformers keeps silently, and raise ValueErrors of one line."""
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: "MegalodonConfig", **values: Any) -> None:
        known = {field.name for field in fields(cls)} | _OTHER_KEYS | cls.attribute_map.keys()
        known |= vars(GenerationConfig()).keys()
        for name in values.keys() - known:
            if not name.startswith("_"):
                near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
                raise ValueError(f"{name}={values[name]!r}: a Megalodon config has no such field{near}")
        try:
            construct(self, **values)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None

    # A decorator's work, to a type checker an assignment to a method, of other arguments.
    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls


@_checked
@strict
class MegalodonConfig(PreTrainedConfig):
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
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
        "tie_word_embeddings": "share_emb",
    }

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
    norm_prior_count: int = 0
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
        for name in (
            "vocab_size",
            "num_layers",
            "model_dim",
            "z_dim",
            "value_dim",
            "num_heads",
            "ffn_hidden_dim",
            "cema_ndim",
            "chunk_size",
            "norm_num_groups",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        for whole, part in (("z_dim", "num_heads"), ("value_dim", "num_heads"), ("model_dim", "norm_num_groups")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} is not divisible by {part}={getattr(self, part)}")
        if self.head_dim % 2:
            raise ValueError(f"z_dim / num_heads = {self.head_dim}: rotary embeddings need it even")
        if self.norm_prior_count < 0:
            raise ValueError(f"norm_prior_count={self.norm_prior_count}: it must not be negative")
        if self.norm_num_groups == self.model_dim and self.norm_prior_count < 2:
            raise ValueError("norm_num_groups = model_dim (a featurewise norm) needs norm_prior_count of at least 2")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 0 and less than 1")
        for name in ("norm_eps", "rope_base"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: it must be positive and finite")
        if self.output_size is not None and self.output_size < 1:
            raise ValueError(f"output_size={self.output_size}: it must be at least 1, or None for vocab_size")
        if self.share_emb and self.output_size not in (None, self.vocab_size):
            raise ValueError(f"output_size={self.output_size} contradicts share_emb, which makes it {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        """Size of a query and key head, Z / H."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """Size of a value head, V / H."""
        return self.value_dim // self.num_heads

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A published size, with any field overridden.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}: there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})
