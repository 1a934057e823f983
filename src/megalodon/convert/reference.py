"""The reference implementations' configs and state dicts, in and out, exact to the bit.

Source: the state dicts and configs of the authors' implementations of arXiv 2404.08801 and arXiv 2601.06463.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from megalodon.convert.parameters import AnyConfig, Parameter, buffers, parameters, prior_count
from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.megalodon.config import MegalodonConfig

_SHARED = (
    *("num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim", "chunk_size"),
    *("init_mode", "vocab_size", "norm_affine", "norm_eps"),
    *("dropout", "hidden_dropout", "attention_dropout", "swiglu", "rescale_nffn", "scale_emb", "share_emb"),
)
_TIME_NORM = ("num_groups", "beta1", "beta2")


@dataclass(frozen=True)
class Fields:
    """How the fields of a reference's model config are ours.

    Attributes:
        config: our config class.
        names: the reference's name of each of our fields that has the same meaning.
        left_behind: what has no field of ours: ways of computing and of training.
        rope_base: what an absent rope_base means.
        attention: what an absent efficient_attn means.
        writes_null: whether null stands for what is absent; else the value is always written.
    """

    config: type[AnyConfig]
    names: Mapping[str, str]
    left_behind: tuple[str, ...]
    rope_base: float
    attention: str | None
    writes_null: bool

    @property
    def known(self) -> set[str]:
        """Every field that the reference has."""
        return {*self.names.values(), *self.left_behind, "efficient_attn", "output_size", "rope_base"}


FIELDS: dict[str, Fields] = {
    "megalodon": Fields(
        MegalodonConfig,
        {name: name for name in (*_SHARED, "norm_num_groups")},
        ("layerwise_ckpt",),
        rope_base=10000.0,
        attention=None,
        writes_null=True,
    ),
    "gecko": Fields(
        GeckoConfig,
        {name: name for name in (*_SHARED, "layernorm_num_groups", "two_hop_residual", "num_rope_heads")}
        | {f"norm_{name}": f"timenorm_{name}" for name in _TIME_NORM},
        ("memory_efficient_norm",),
        rope_base=500000.0,
        attention="fused",
        writes_null=False,
    ),
}
"""The authors' implementations, by the architecture that is ours."""
ATTENTION_DROPOUT = {None: "softmax", "swift": "dropkey", "fused": "dropkey"}
TIED_HEAD = ("output.output.weight", "embed.weight")
WRAPPER_PREFIXES = ("module.", "model.")


def config_from_reference(reference: Mapping[str, Any], architecture: str = "megalodon") -> Any:
    """Our config for the reference's.

    Args:
        reference: its model config (the golden vectors' `config`), or a whole checkpoint's config.json, whose `model`
            key holds one. Absent fields take our defaults; `efficient_attn` says how attention dropout acts;
            `layerwise_ckpt` (Megalodon's) and `memory_efficient_norm` (Gecko's), ways of computing, are left behind.
        architecture: "megalodon" or "gecko": whose reference it is.

    Returns:
        A `MegalodonConfig` or a `GeckoConfig`.

    Raises:
        ValueError: for a field that the reference does not have, or values that contradict one another.
    """
    if architecture not in FIELDS:
        raise ValueError(f"architecture is {architecture!r}; it must be one of {', '.join(FIELDS)}")
    fields = FIELDS[architecture]
    inner = inner_config(reference)
    _check_fields(inner, architecture)
    attention = inner.get("efficient_attn", fields.attention)
    if attention not in ATTENTION_DROPOUT:
        raise ValueError(f"efficient_attn is {attention!r}; it must be null, 'swift' or 'fused'")
    vocab_size = inner.get("vocab_size", -1)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size!r}; it must be the number of rows of embed.weight")
    values = {ours: inner[theirs] for ours, theirs in fields.names.items() if theirs in inner}
    values["attention_dropout_mode"] = ATTENTION_DROPOUT[attention]
    if inner.get("output_size", -1) != -1:
        values["output_size"] = inner["output_size"]
    if (rope_base := inner.get("rope_base")) is not None:
        values["rope_base"] = float(rope_base) if isinstance(rope_base, int) else rope_base
    try:
        return fields.config(**values)
    except StrictDataclassError as error:  # Transformers' wrapping of what is wrong
        raise ValueError(f"the reference's model config is not possible: {error.__cause__ or error}") from None


def inner_config(reference: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's fields of a reference's config.json, or of a model config itself.

    Raises:
        ValueError: what should hold them is no object.
    """
    inner = reference.get("model", reference)
    if not isinstance(inner, Mapping):
        raise ValueError(f"config key 'model' must hold the model's fields, not {inner!r}")
    return inner


def architecture_of(reference: Mapping[str, Any]) -> str:
    """Whose config it is, told by the fields that the others do not have; the first of `FIELDS` where none tells.

    Raises:
        ValueError: as `inner_config`.
    """
    inner = set(inner_config(reference))

    def own(architecture: str) -> int:
        others = set().union(*(fields.known for name, fields in FIELDS.items() if name != architecture))
        return len(inner & (FIELDS[architecture].known - others))

    return max(FIELDS, key=own)


def _check_fields(inner: Mapping[str, Any], architecture: str) -> None:
    ways = {name for fields in FIELDS.values() for name in fields.left_behind}
    unknown = sorted(set(inner) - FIELDS[architecture].known, key=lambda name: (name in ways, name))
    if not unknown:
        return
    others = [name for name, fields in FIELDS.items() if name != architecture and set(inner) <= fields.known]
    hint = f"; it looks like a {others[0]} config" if others else f"; it has {sorted(FIELDS[architecture].known)}"
    raise ValueError(f"unknown field {unknown[0]!r} in the reference's {architecture} model config{hint}")


def config_to_reference(config: AnyConfig) -> dict[str, Any]:
    """The reference's model config for ours. `norm_prior_count` has no field there: its state dict carries it; nor have
    `multi_segments` and `bos_token_id`, which its programs pass to the model.

    Raises:
        ValueError: for Gecko with attention dropout of weights: its reference can only drop keys.
    """
    fields = FIELDS[config.model_type]
    values = {theirs: getattr(config, ours) for ours, theirs in fields.names.items()}
    values["efficient_attn"] = "fused" if config.attention_dropout_mode == "dropkey" else None
    if not fields.writes_null and values["efficient_attn"] is None:
        if config.attention_dropout > 0:
            raise ValueError(
                f"attention_dropout_mode={config.attention_dropout_mode!r} with attention_dropout="
                f"{config.attention_dropout}: the authors' {config.model_type} can only drop keys, 'dropkey'"
            )
        values["efficient_attn"] = fields.attention  # nothing is dropped either way
    tied_to_vocabulary = config.output_size in (None, config.vocab_size)
    values["output_size"] = -1 if tied_to_vocabulary else config.output_size
    values["rope_base"] = None if fields.writes_null and config.rope_base == fields.rope_base else config.rope_base
    return values | dict.fromkeys(fields.left_behind, False)


def state_dict_from_reference(state_dict: Mapping[str, Tensor], config: AnyConfig) -> dict[str, Tensor]:
    """The same tensors under our names.

    Args:
        state_dict: parameters, or anything of their names and shapes (gradients, an optimiser's moments); any subset,
            any dtype. A wrapper's prefix common to all names (`module.`, `model.`) is taken off. The reference's
            buffers are checked against the config and left out; a tied head is checked to equal the embedding.
        config: our config of that model.

    Raises:
        ValueError: for an unknown name, a shape that the config does not give, or a buffer that contradicts the config.
    """
    state_dict = without_wrapper(state_dict)
    table = {entry.reference: entry for entry in parameters(config)}
    renamed = {}
    for name in _checked_buffers(state_dict, config):
        entry = _entry(table, name, tuple(state_dict[name].shape), "the reference's")
        renamed[entry.ours] = state_dict[name]
    return renamed


def state_dict_to_reference(state_dict: Mapping[str, Tensor], config: AnyConfig) -> dict[str, Tensor]:
    """The same tensors under the reference's names.

    A complete state dict also receives the reference's buffers (`rope.freqs`, each norm's `prior_count`, and
    `prior_mean` and `prior_logv` or `prior_var` where they are not parameters); a subset does not. Dtypes stay as they
    are.

    Raises:
        ValueError: for an unknown name or a shape that the config does not give.
    """
    table = {entry.ours: entry for entry in parameters(config)}
    names = set(state_dict)
    if config.share_emb:
        names.discard("lm_head.weight")
    renamed = {}
    for name in (name for name in state_dict if name in names):
        entry = _entry(table, name, tuple(state_dict[name].shape), f"a {config.model_type}")
        renamed[entry.reference] = state_dict[name]
    if names == set(table):
        renamed |= make_buffers(config, state_dict["model.embed_tokens.weight"])
    return renamed


def make_buffers(config: AnyConfig, like: Tensor) -> dict[str, Tensor]:
    """The reference's buffers for this config, on the device of `like` and, where they are floating, of its dtype."""
    made: dict[str, Tensor] = {}
    for buffer in buffers(config):
        if buffer.reference == "rope.freqs":
            value = rope_frequencies(config).to(like)
        elif buffer.reference.endswith("prior_count"):
            value = torch.tensor(prior_count(config), dtype=torch.int64, device=like.device)
        else:
            value = torch.zeros(buffer.shape, dtype=like.dtype, device=like.device)
        made[buffer.reference] = value
    return made


def rope_frequencies(config: AnyConfig) -> Tensor:
    """Rotation per position of each pair of a head's features, in radians: float32 [Z / H / 2].

    The powers are taken in double precision and inverted in single, as the reference does, so that its buffer is
    reproduced to the bit.
    """
    head_dim = config.z_dim // config.num_heads
    powers = [config.rope_base ** (index / head_dim) for index in range(0, head_dim, 2)]
    return 1.0 / torch.tensor(powers, dtype=torch.float32)


def without_wrapper(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take off a prefix that a wrapping module gave to every name."""
    for prefix in WRAPPER_PREFIXES:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            return without_wrapper({name.removeprefix(prefix): value for name, value in state_dict.items()})
    return state_dict


def _checked_buffers(state_dict: Mapping[str, Tensor], config: AnyConfig) -> list[str]:
    """Check the buffers and the tied head that are there, and return the other names."""
    known = {buffer.reference: buffer for buffer in buffers(config)}
    others = []
    for name, value in state_dict.items():
        if config.share_emb and name == TIED_HEAD[0]:
            embedding = state_dict.get(TIED_HEAD[1])
            if embedding is not None and not torch.equal(embedding, value):
                raise ValueError(f"{name} differs from {TIED_HEAD[1]}, but share_emb says that they are one tensor")
        elif name in known:
            _check_shape(name, tuple(value.shape), known[name].shape)
            _check_buffer(name, value, config)
        else:
            others.append(name)
    return others


def _check_buffer(name: str, value: Tensor, config: AnyConfig) -> None:
    if name.endswith("prior_count") and int(value) != prior_count(config):
        where = (
            "but Gecko's norms have no prior: it must be"
            if isinstance(config, GeckoConfig)
            else ("but the config's norm_prior_count is")
        )
        raise ValueError(f"{name} is {int(value)}, {where} {prior_count(config)}")
    if name == "rope.freqs":
        expected = rope_frequencies(config)
        tolerance = 4 * torch.finfo(value.dtype).eps
        if not torch.allclose(value.float().cpu(), expected, rtol=tolerance, atol=0):
            raise ValueError(f"rope.freqs do not follow from the config's rope_base, {config.rope_base}")


def _entry(table: dict[str, Parameter], name: str, shape: tuple[int, ...], owner: str) -> Parameter:
    if name not in table:
        raise ValueError(f"{name!r} is no parameter of {owner} model of this config; one is {next(iter(table))!r}")
    _check_shape(name, shape, table[name].shape)
    return table[name]


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name} has shape {list(shape)}; the config gives it {list(expected)}")
