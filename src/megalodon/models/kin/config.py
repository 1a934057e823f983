"""The shape of a kin model: a pre-norm decoder whose mixers are named, one for all layers or one per layer."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import torch
from pydantic import ValidationError

from megalodon.models.config import Config, architecture_config
from megalodon.models.kin.mixers import MIXERS, MixerParameters, mixer_class


@architecture_config
class KinConfig(Config):
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
        rope_frequencies: in place of rope_base: pair i of a head turns by so many radians a token; numbers of a head
            beyond its pairs do not turn. What a model was trained with, whatever scaling it came from.
        rope_amplitude: what turned numbers are multiplied with, with rope_frequencies.
        norm: "rms", or "layer" with biases.
        norm_eps: added to mean squares or variances.
        parallel: mixer and feed-forward layer read the same norm of a block's input, and both are added to it.
        feed_forward: "swiglu", or "gelu" of two layers with biases.
        head_bias: of the output matrix.
        init_std: of linear layers and embeddings.
        two_way: every token sees the whole of its document: an encoder, of the mixers that have this form.
        share_emb: tie the output matrix to the embedding (alias `tie_word_embeddings`).
        output_size: rows of the output matrix. None: vocab_size.
        dropout: of residual branches.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or is out of range, a mixer or a parameter of one is
            unknown, or sizes do not divide; the message names the field.
    """

    model_type = "megalodon-kin"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
        "tie_word_embeddings": "share_emb",
    }
    identity_fields = (
        *("vocab_size", "num_layers", "model_dim", "num_heads", "num_key_value_heads", "head_dim", "mixers"),
        *("mixer_parameters", "ffn_hidden_dim", "rope_base", "rope_frequencies", "share_emb", "output_size"),
        *("rope_amplitude", "norm", "norm_eps", "parallel", "feed_forward", "head_bias", "two_way"),
    )
    free_in_fine_tuning = ("dropout",)

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
    rope_frequencies: list[float] | None = None
    rope_amplitude: float | int = 1.0
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | int = 1e-6
    parallel: bool = False
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    head_bias: bool = False
    init_std: float | int = 0.02
    two_way: bool = False
    share_emb: bool = False
    dropout: float | int = 0.0
    output_size: int | None = None
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
        self.require_positive(("vocab_size", "num_layers", "model_dim", "num_heads", "num_key_value_heads"))
        self.require_output_size()
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
        self.require_probabilities("dropout")
        for name in ("norm_eps", "rope_base", "init_std"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: it must be positive and finite")
        self._check_rotary()
        self._check_mixers()

    def _check_rotary(self) -> None:
        found = self.rope_frequencies
        if found is None:
            if self.rope_amplitude != 1:
                raise ValueError(f"rope_amplitude={self.rope_amplitude}: it goes with rope_frequencies")
            return
        if not 1 <= len(found) <= self.head_size // 2:
            raise ValueError(
                f"rope_frequencies has {len(found)} numbers: a head of {self.head_size} has 1 to {self.head_size // 2} "
                "pairs"
            )
        if not all(value >= 0 and math.isfinite(value) for value in found):
            raise ValueError("rope_frequencies: they must be finite and not negative")

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
        for name, parameters in map(self.mixer_of, range(self.num_layers)):
            mixer = mixer_class(name)
            turns = self.rope_base is not None or self.rope_frequencies is not None
            if turns and self.head_size % 2 and mixer.turns_with(parameters):
                raise ValueError(
                    f"head_dim={self.head_dim}: {name} turns heads in pairs: it must be even, or rope_base=None"
                )
            if self.rope_frequencies is not None and mixer.own_rotary:
                raise ValueError(f"rope_frequencies: {name} turns by powers of rope_base alone")
            if self.parallel and mixer.takes_residual:
                raise ValueError(f"parallel=True: {name} has norms of its own, so that there is none to share")
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
            raise ValueError(refusal(entry, error)) from None
        parameters.check(self)
        return entry, parameters

    @classmethod
    def hint(cls, name: str) -> str:
        where = _mixers_with(name)
        return f"; it is a parameter of {', '.join(where)}: put it into mixer_parameters" if where else ""

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
        if self.two_way:
            return "none"
        layers = map(self.mixer_of, range(self.num_layers))
        kinds = {mixer_class(name).kind_with(parameters) for name, parameters in layers}
        return next((kind for kind in ("none", "growing") if kind in kinds), "constant")

    def sequence_multiply_adds(self, length: int) -> float:
        layers = [self.mixer_of(layer) for layer in range(self.num_layers)]
        return sum(mixer_class(name).multiply_adds(self, parameters, length) for name, parameters in layers)

    def streaming_problem(self) -> str | None:
        if self.two_way:
            return "two_way=True sees the text before and after each token: use packed batches"
        layers = [self.mixer_of(layer) for layer in range(self.num_layers)]
        kinds = [mixer_class(name).kind_with(parameters) for name, parameters in layers]
        whole = sorted({name for (name, _), kind in zip(layers, kinds, strict=True) if kind == "none"})
        if whole:
            return f"{', '.join(whole)} cannot be read in pieces: use packed batches"
        growing = sorted({name for (name, _), kind in zip(layers, kinds, strict=True) if kind == "growing"})
        if not growing:
            return None
        return (
            f"the state of {', '.join(growing)} grows by up to {self._growth():,} bytes with each token of each row, "
            "without end: use packed batches, or a mixer with a window, such as sliding_attention"
        )

    def _growth(self) -> int:
        """Bytes that a token in float32 may add to the state of a row, in all layers."""
        total = 0
        for layer in range(self.num_layers):
            name, parameters = self.mixer_of(layer)
            with torch.device("meta"):
                memory = mixer_class(name)(self, layer, parameters).empty(0, torch.device("meta"), torch.float32)
            shapes = {} if memory is None else memory.shapes()
            places = [[size or 1 for size in shape[2:]] for shape in shapes.values() if -1 in shape]
            total += sum(4 * math.prod(sizes) for sizes in places)
        return total


_LIMITS = {
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be more than {gt}",
    "less_than_equal": "it must be at most {le}",
    "finite_number": "it must be finite",
}


def refusal(mixer: str, error: ValidationError) -> str:
    """One line about the first wrong parameter of a mixer."""
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        limit = _LIMITS.get(problem["type"])
        said = problem["msg"] if limit is None else limit.format(**problem.get("ctx", {}))
        return f"{mixer}: {name}={problem['input']!r}: {said}"
    fields = list(mixer_class(mixer).Parameters.model_fields)
    near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, fields, 1))
    elsewhere = [other for other in _mixers_with(name) if other != mixer]
    if elsewhere and not near:
        near = f"; it is a parameter of {', '.join(elsewhere)}"
    return f"{mixer} has no parameter {name!r}{near} (it has {', '.join(fields) or 'none'})"


def _mixers_with(parameter: str) -> list[str]:
    return [name for name in MIXERS if parameter in mixer_class(name).Parameters.model_fields]
