"""The shape of a MEGABYTE model: stages from the coarsest, over whole patches, to the finest, over bytes."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import math
from typing import Any, ClassVar

from megalodon.models.config import Config, architecture_config


@architecture_config
class MegabyteConfig(Config):
    """Configuration of a MEGABYTE model. Keyword arguments only. Lists go from the coarsest stage to the finest.

    Attributes:
        vocab_size: number of byte values.
        model_dim: width of the finest stage and of every byte embedding (alias `hidden_size`).
        coarse_dims: widths of the other stages.
        depths: layers of each stage.
        patch_sizes: how many of the next stage's elements one element of a stage holds; their product is the bytes of
            a whole patch.
        num_heads: heads of every stage (alias `num_attention_heads`).
        head_dim: size of a head.
        ffn_factor: width of a feed-forward layer over that of its stage.
        rope_base: base of the rotary embedding inside each stage; None: none.
        max_patches: patches that have learned positions, and the most that can be read; None: no learned positions,
            no limit.
        init_std: of linear layers and embeddings.
        dropout: of residual branches.
        num_layers: layers of the coarsest stage, which are those that remember: given by `depths`.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or is out of range, or lists do not match; the message
            names the field.
    """

    model_type = "megalodon-megabyte"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "share_emb",
    }
    identity_fields = (
        *("vocab_size", "model_dim", "coarse_dims", "depths", "patch_sizes", "num_heads", "head_dim", "ffn_factor"),
        *("rope_base", "max_patches"),
    )
    free_in_fine_tuning = ("dropout",)

    vocab_size: int = 256
    num_layers: int = 0
    model_dim: int = 256
    coarse_dims: list[int] | None = None
    depths: list[int] | None = None
    patch_sizes: list[int] | None = None
    num_heads: int = 8
    head_dim: int = 64
    ffn_factor: int = 4
    rope_base: float | int | None = 10000.0
    max_patches: int | None = None
    init_std: float | int = 0.02
    share_emb: bool = False
    dropout: float | int = 0.0
    output_size: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.patch_sizes is None:
            self.patch_sizes = [8]
        if self.coarse_dims is None:
            self.coarse_dims = [2 * self.model_dim] * len(self.patch_sizes)
        if self.depths is None:
            self.depths = [6] * len(self.coarse_dims) + [3]
        if self.depths and self.num_layers == 0:
            self.num_layers = self.depths[0]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes make a model; called on construction."""
        super().validate_architecture()
        self.require_positive(("vocab_size", "model_dim", "num_heads", "head_dim", "ffn_factor"))
        for name in ("coarse_dims", "depths", "patch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}={values}: it must hold numbers of at least 1")
        stages = len(self.patches) + 1
        if len(self.coarse) != stages - 1 or len(self.layers_of) != stages:
            raise ValueError(
                f"patch_sizes={self.patch_sizes} makes {stages} stages: coarse_dims={self.coarse_dims} must have "
                f"{stages - 1} values and depths={self.depths} must have {stages}"
            )
        if self.num_layers != self.layers_of[0]:
            raise ValueError(f"num_layers={self.num_layers} contradicts depths={self.depths}, which makes it the first")
        if self.rope_base is not None:
            self.require_positive_finite("rope_base")
            if self.head_dim % 2:
                raise ValueError(f"head_dim={self.head_dim}: it must be even to turn (or rope_base None)")
        if any(width % 2 for width in self.widths):
            raise ValueError(f"model_dim={self.model_dim}, coarse_dims={self.coarse_dims}: widths must be even")
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"max_patches={self.max_patches}: it must be at least 1, or None")
        if self.share_emb:
            raise ValueError("share_emb=True: every stage has an embedding of its own: there is none to share")
        if self.output_size not in (None, self.vocab_size):
            raise ValueError(f"output_size={self.output_size}: it must be vocab_size={self.vocab_size}, or None")
        self.require_probabilities("dropout")
        self.require_positive_finite("init_std")

    @property
    def patches(self) -> list[int]:
        """`patch_sizes`, known."""
        return list(self.patch_sizes or ())

    @property
    def coarse(self) -> list[int]:
        """`coarse_dims`, known."""
        return list(self.coarse_dims or ())

    @property
    def layers_of(self) -> list[int]:
        """`depths`, known."""
        return list(self.depths or ())

    @property
    def widths(self) -> list[int]:
        """The width of every stage."""
        return [*self.coarse, self.model_dim]

    @property
    def patch_bytes(self) -> int:
        """Bytes of a whole patch: what the coarsest stage reads at a time."""
        return math.prod(self.patches)

    def sequence_multiply_adds(self, length: int) -> float:
        """See `Config`: attention of patches over half of all patches, and of each finer stage inside its patches."""
        width, patches = 2 * self.num_heads * self.head_dim, self.patches
        total, elements = 0.0, 1.0 / self.patch_bytes
        for stage, depth in enumerate(self.layers_of):
            seen = length / self.patch_bytes / 2 if stage == 0 else (patches[stage - 1] + 2) / 2
            total += depth * elements * seen * width
            if stage < len(patches):
                elements *= patches[stage]
        return total
