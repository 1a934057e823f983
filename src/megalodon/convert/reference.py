"""The reference implementation's config and state dict, in and out, exact to the bit.

Source: the state dicts and config of the authors' implementation of arXiv 2404.08801.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from megalodon.convert.parameters import Parameter, buffers, parameters
from megalodon.models.megalodon.config import MegalodonConfig

SAME_NAME = (
    *("num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim", "chunk_size"),
    *("init_mode", "vocab_size", "norm_num_groups", "norm_affine", "norm_eps"),
    *("dropout", "hidden_dropout", "attention_dropout", "swiglu", "rescale_nffn", "scale_emb", "share_emb"),
)
OWN_NAME = ("efficient_attn", "output_size", "rope_base", "layerwise_ckpt")
ATTENTION_DROPOUT = {None: "softmax", "swift": "dropkey", "fused": "dropkey"}
TIED_HEAD = ("output.output.weight", "embed.weight")
WRAPPER_PREFIXES = ("module.", "model.")


def config_from_reference(reference: Mapping[str, Any]) -> MegalodonConfig:
    """Our config for the reference's.

    Args:
        reference: its model config (the golden vectors' `config`), or a whole checkpoint's config.json, whose `model`
            key holds one. Absent fields take our defaults; `efficient_attn` says how attention dropout acts, and
            `layerwise_ckpt`, a way of training, is left behind.

    Raises:
        ValueError: for a field that the reference does not have, or values that contradict one another.
    """
    inner = reference.get("model", reference)
    if not isinstance(inner, Mapping):
        raise ValueError(f"config key 'model' must hold the model's fields, not {inner!r}")
    unknown = sorted(set(inner) - set(SAME_NAME) - set(OWN_NAME))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} in the reference's model config; it has {sorted(SAME_NAME)}")
    attention = inner.get("efficient_attn")
    if attention not in ATTENTION_DROPOUT:
        raise ValueError(f"efficient_attn is {attention!r}; it must be null, 'swift' or 'fused'")
    if inner.get("vocab_size", -1) < 1:
        raise ValueError(f"vocab_size is {inner.get('vocab_size')!r}; it must be the number of rows of embed.weight")
    fields = {name: inner[name] for name in SAME_NAME if name in inner}
    fields["attention_dropout_mode"] = ATTENTION_DROPOUT[attention]
    if inner.get("output_size", -1) != -1:
        fields["output_size"] = inner["output_size"]
    if inner.get("rope_base") is not None:
        fields["rope_base"] = float(inner["rope_base"])
    try:
        return MegalodonConfig(**fields)
    except StrictDataclassError as error:  # Transformers' wrapping of what is wrong
        raise ValueError(f"the reference's model config is not possible: {error.__cause__ or error}") from None


def config_to_reference(config: MegalodonConfig) -> dict[str, Any]:
    """The reference's model config for ours. `norm_prior_count` has no field there: its state dict carries it."""
    fields = {name: getattr(config, name) for name in SAME_NAME}
    fields["efficient_attn"] = "fused" if config.attention_dropout_mode == "dropkey" else None
    tied_to_vocabulary = config.output_size in (None, config.vocab_size)
    fields["output_size"] = -1 if tied_to_vocabulary else config.output_size
    fields["rope_base"] = None if config.rope_base == 10000.0 else config.rope_base
    fields["layerwise_ckpt"] = False
    return fields


def state_dict_from_reference(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
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


def state_dict_to_reference(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
    """The same tensors under the reference's names.

    A complete state dict also receives the reference's buffers (`rope.freqs`, each norm's `prior_count`, and
    `prior_mean` and `prior_logv` where they are not parameters); a subset does not. Dtypes stay as they are.

    Raises:
        ValueError: for an unknown name or a shape that the config does not give.
    """
    table = {entry.ours: entry for entry in parameters(config)}
    names = set(state_dict)
    if config.share_emb:
        names.discard("lm_head.weight")
    renamed = {}
    for name in (name for name in state_dict if name in names):
        entry = _entry(table, name, tuple(state_dict[name].shape), "a Megalodon")
        renamed[entry.reference] = state_dict[name]
    if names == set(table):
        renamed |= make_buffers(config, state_dict["model.embed_tokens.weight"])
    return renamed


def make_buffers(config: MegalodonConfig, like: Tensor) -> dict[str, Tensor]:
    """The reference's buffers for this config, on the device of `like` and, where they are floating, of its dtype."""
    made: dict[str, Tensor] = {}
    for buffer in buffers(config):
        if buffer.reference == "rope.freqs":
            value = rope_frequencies(config).to(like)
        elif buffer.reference.endswith("prior_count"):
            value = torch.tensor(config.norm_prior_count, dtype=torch.int64, device=like.device)
        else:
            value = torch.zeros(buffer.shape, dtype=like.dtype, device=like.device)
        made[buffer.reference] = value
    return made


def rope_frequencies(config: MegalodonConfig) -> Tensor:
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


def _checked_buffers(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> list[str]:
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


def _check_buffer(name: str, value: Tensor, config: MegalodonConfig) -> None:
    if name.endswith("prior_count") and int(value) != config.norm_prior_count:
        raise ValueError(f"{name} is {int(value)}, but the config's norm_prior_count is {config.norm_prior_count}")
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
