"""The shape of a kin model: a pre-norm decoder whose mixers are named, one for all layers or one per layer."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import functools
import math
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedConfig

from megalodon.models.kin.mixers import MIXERS, MixerParameters, mixer_class

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


def _checked(cls: type["KinConfig"]) -> type["KinConfig"]:
    """Make construction refuse unknown keys, which Transformers keeps silently, and raise ValueErrors of one line."""
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: "KinConfig", **values: Any) -> None:
        known = {field.name for field in fields(cls)} | _OTHER_KEYS | cls.attribute_map.keys()
        known |= vars(GenerationConfig()).keys()
        for name in values.keys() - known:
            if not name.startswith("_"):
                near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
                where = _mixers_with(name)
                if where:
                    near = f"; it is a parameter of {', '.join(where)}: put it into mixer_parameters"
                raise ValueError(f"{name}={values[name]!r}: a kin config has no such field{near}")
        try:
            construct(self, **values)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None

    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls


@_checked
@strict
class KinConfig(PreTrainedConfig):
    """Configuration of a kin model. Keyword arguments only.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of blocks (alias `num_hidden_layers`).
        model_dim: D, the width of the residual stream (alias `hidden_size`).
        num_heads: H (alias `num_attention_heads`).
        num_key_value_heads: heads of keys and values where a mixer groups them; divides num_heads. None: num_heads.
        head_dim: size of a head where a mixer has no other rule. None: model_dim / num_heads.
        mixers: the mixer of all layers, or a list with that of each. An entry is a name, or {"name": ..., and
            parameters of this layer's}. See `megalodon.models.kin.mixers`.
        mixer_parameters: mixer name -> its parameters, for all layers that have it.
        ffn_hidden_dim: width of the SwiGLU layer (alias `intermediate_size`); 0: none. None: 8/3 of model_dim, in
            sixteens.
        rope_base: base of the rotary embedding of the mixers that have one; None: no rotary embedding.
        norm_eps: added to mean squares.
        init_std: of linear layers and embeddings.
        two_way: every token sees the whole of its document: an encoder, of the mixers that have this form.
        tie_word_embeddings: share the embedding with the output matrix.
        dropout: of residual branches.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or is out of range, a mixer or a parameter of one is
            unknown, or sizes do not divide; the message names the field.
    """

    model_type = "megalodon-kin"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
    }

    vocab_size: int = 32000
    num_layers: int = 12
    model_dim: int = 768
    num_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mixers: str | list[str | dict[str, Any]] = "attention"
    mixer_parameters: dict[str, dict[str, Any]] | None = None
    ffn_hidden_dim: int | None = None
    rope_base: float | int | None = 10000.0
    norm_eps: float | int = 1e-6
    init_std: float | int = 0.02
    two_way: bool = False
    tie_word_embeddings: bool = False
    dropout: float | int = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_heads
        if self.head_dim is None and self.num_heads > 0 and self.model_dim % self.num_heads == 0:
            self.head_dim = self.model_dim // self.num_heads
        if self.ffn_hidden_dim is None:
            self.ffn_hidden_dim = -(-8 * self.model_dim // 48) * 16
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes make a model; called on construction."""
        super().validate_architecture()
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.head_dim is None:
            raise ValueError(f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}: set head_dim")
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim}: it must be at least 1")
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_key_value_heads={self.num_key_value_heads}"
            )
        if self.ffn_hidden_dim is None or self.ffn_hidden_dim < 0:
            raise ValueError(f"ffn_hidden_dim={self.ffn_hidden_dim}: it must be at least 0 (0: no feed-forward layer)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: it must be at least 0 and less than 1")
        for name in ("norm_eps", "rope_base", "init_std"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: it must be positive and finite")
        self._check_mixers()

    def _check_mixers(self) -> None:
        if isinstance(self.mixers, list) and len(self.mixers) != self.num_layers:
            raise ValueError(
                f"mixers names {len(self.mixers)} layers: it must name all {self.num_layers} (num_layers), or be one "
                "name for all"
            )
        names = {name for name, _ in map(self.mixer_of, range(self.num_layers))}
        for name in self.mixer_parameters or {}:
            mixer_class(name)
            if name not in names:
                raise ValueError(f"mixer_parameters has {name!r}, but no layer has this mixer: they have {names}")
        for name in names:
            mixer = mixer_class(name)
            if self.two_way and not mixer.two_way_mode:
                raise ValueError(f"two_way=True: {name} has no form that sees both sides")
            if not self.two_way and not mixer.causal_mode:
                raise ValueError(f"{name} sees both sides: it needs two_way=True, which no language model has")

    def mixer_of(self, layer: int) -> tuple[str, MixerParameters]:
        """The name and the parameters of a layer's mixer.

        Raises:
            ValueError: the mixer or a parameter is unknown, or a value does not fit; the message names it.
        """
        entry = self.mixers if isinstance(self.mixers, str) else self.mixers[layer]
        own: Mapping[str, Any] = {}
        if isinstance(entry, dict):
            own = {key: value for key, value in entry.items() if key != "name"}
            if "name" not in entry:
                raise ValueError(f"mixers: {entry} has no 'name'")
            entry = entry["name"]
        given = {**(self.mixer_parameters or {}).get(entry, {}), **own}
        kind = mixer_class(entry).Parameters
        try:
            parameters = kind(**given)
        except ValidationError as error:
            raise ValueError(_refusal(entry, kind, error)) from None
        parameters.check(self)
        return entry, parameters

    @property
    def head_size(self) -> int:
        """`head_dim`, known."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def key_value_heads(self) -> int:
        """`num_key_value_heads`, known."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def state_kind(self) -> str:
        """ "none" if a layer cannot be read in pieces, "growing" if one's memory grows, else "constant"."""
        layers = map(self.mixer_of, range(self.num_layers))
        kinds = {mixer_class(name).kind_with(parameters) for name, parameters in layers}
        return next((kind for kind in ("none", "growing") if kind in kinds), "constant")


def _refusal(mixer: str, kind: type[MixerParameters], error: ValidationError) -> str:
    """One line about the first wrong parameter of a mixer."""
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{mixer}: {name}={problem['input']!r}: {problem['msg']}"
    known = list(kind.model_fields)
    near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
    elsewhere = [other for other in _mixers_with(name) if other != mixer]
    if elsewhere and not near:
        near = f"; it is a parameter of {', '.join(elsewhere)}"
    return f"{mixer} has no parameter {name!r}{near} (it has {', '.join(known) or 'none'})"


def _mixers_with(parameter: str) -> list[str]:
    return [name for name in MIXERS if parameter in mixer_class(name).Parameters.model_fields]
