"""Whole models of other libraries as kin models and back: the same parameters under other names.

One `Peer` a model type. Options that the kin does not have are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from megalodon.models.kin import KinConfig, KinForCausalLM
from megalodon.models.kin.mixers.mamba import mamba_options
from megalodon.models.kin.mixers.mamba2 import mamba2_options


class Peer(NamedTuple):
    """How one model type stands to the kin.

    Attributes:
        fields: the peer's config -> those of `KinConfig`.
        options: a kin config -> those of the peer's config.
        names: fragments of the peer's parameter names and ours; where several fit, the first is taken.
        body: what the peer calls the network without its head.
    """

    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    options: Callable[[KinConfig], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    body: str = "model"


def kin_from_transformers(model: PreTrainedModel) -> KinForCausalLM:
    """A kin model with the parameters of a causal language model of Transformers (or flash-linear-attention).

    Raises:
        ValueError: its type is not known here, or it has an option that the kin does not; the message names it.
    """
    return kin_from_peer(model.config.to_dict(), model.state_dict())


def kin_from_peer(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> KinForCausalLM:
    """`kin_from_transformers` from a config.json and a state dict, for peers that are not installed."""
    peer = peer_of(str(config.get("model_type")))
    fields = peer.fields(config)
    ours = {_renamed(name, peer, 0): value for name, value in state_dict.items()}
    model = KinForCausalLM(KinConfig(**fields))
    nn.Module.to(model, next(iter(state_dict.values())).dtype)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"the parameters do not fit: missing {missing}, unknown {unexpected}")
    model.tie_weights()
    return model.eval()


def kin_to_transformers(model: KinForCausalLM, model_type: str) -> PreTrainedModel:
    """The model of Transformers with the parameters of a kin model.

    Raises:
        ValueError: the type is not known here, or the model has a mixer or an option that the type does not.
    """
    peer = peer_of(model_type)
    config = AutoConfig.for_model(model_type, **peer.options(model.config))
    assert isinstance(config, PreTrainedConfig)
    theirs = AutoModelForCausalLM.from_config(config).to(model.lm_head.weight.dtype)
    known = theirs.state_dict()
    peer = peer._replace(names=tuple(pair for pair in peer.names if any(_has(name, pair[0]) for name in known)))
    theirs.load_state_dict({_renamed(name, peer, 1): value for name, value in model.state_dict().items()})
    theirs.tie_weights()
    return theirs.eval()


def peer_of(model_type: str) -> Peer:
    """The peer of a model type.

    Raises:
        ValueError: there is none.
    """
    if model_type not in PEERS:
        raise ValueError(f"model_type={model_type!r}: the kin know the parameters of {', '.join(sorted(PEERS))}")
    return PEERS[model_type]


def refuse(config: Mapping[str, Any], **allowed: Any) -> None:
    """Raise ValueError, naming the first option whose value is given and not the one allowed (or one of a tuple)."""
    for name, wanted in allowed.items():
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{name}={config[name]!r} is not reproduced: it must be {' or '.join(map(repr, values))}")


def only(config: KinConfig, mixer: str) -> dict[str, Any]:
    """The parameters of the one mixer that every layer has.

    Raises:
        ValueError: a layer has another, or layers differ.
    """
    layers = [config.mixer_of(layer) for layer in range(config.num_layers)]
    if any(layer != (mixer, layers[0][1]) for layer in layers):
        raise ValueError(f"mixers={config.mixers!r}: every layer must be {mixer!r}, with the same parameters")
    return layers[0][1].model_dump()


def _has(name: str, fragment: str) -> bool:
    return re.search(rf"(^|\.){re.escape(fragment)}\.", name) is not None


def _renamed(name: str, peer: Peer, side: int) -> str:
    bodies = (peer.body, "model")
    if name.startswith(f"{bodies[side]}."):
        name = bodies[1 - side] + name.removeprefix(bodies[side])
    for pair in peer.names:
        old, new = pair[side], pair[1 - side]
        if _has(name, old):
            return re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name, count=1)
    return name


def _llama_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", mlp_bias=False, pretraining_tp=1)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    refuse(rope, rope_type="default", partial_rotary_factor=(1.0, None))
    bias = bool(config.get("attention_bias", False))
    return {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "model_dim": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_key_value_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "ffn_hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": float(rope["rope_theta"]),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "mixers": "attention",
        "mixer_parameters": {"attention": {"bias": bias, "out_bias": bias}},
        **_ends(config),
    }


def _llama_options(config: KinConfig) -> dict[str, Any]:
    parameters = only(config, "attention")
    if parameters["bias"] != parameters["out_bias"]:
        raise ValueError("attention: bias and out_bias differ: a Llama has both or none")
    if config.rope_base is None:
        raise ValueError("rope_base=None: a Llama has a rotary embedding")
    if not config.ffn_hidden_dim:
        raise ValueError("ffn_hidden_dim=0: a Llama has a feed-forward layer")
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_hidden_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": parameters["bias"],
        **_ends({name: getattr(config, name) for name in _END_FIELDS}),
    }


_END_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _ends(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name) for name in _END_FIELDS}


def _gla_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act=("swish", "silu"), use_short_conv=False, attn=None, use_gv=(False, None))
    hidden = config.get("intermediate_size")
    if hidden is None:  # flash-linear-attention rounds two thirds up to 256ths
        hidden = -(-int(config["hidden_size"] * config.get("hidden_ratio", 4) * 2 / 3) // 256) * 256
    parameters = {
        "expand_k": float(config.get("expand_k", 0.5)),
        "expand_v": float(config.get("expand_v", 1.0)),
        "least_log_decay": config.get("clamp_min"),
        "feature_map": config.get("feature_map"),
        "output_gate": bool(config.get("use_output_gate", True)),
        "norm_eps": float(config.get("norm_eps", 1e-6)),
    }
    return {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "model_dim": config["hidden_size"],
        "num_heads": config["num_heads"],
        "num_key_value_heads": config.get("num_kv_heads"),
        "ffn_hidden_dim": hidden,
        "norm_eps": config.get("norm_eps", 1e-6),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "mixers": "gla",
        "mixer_parameters": {"gla": parameters},
        **_ends(config),
    }


def _gla_options(config: KinConfig) -> dict[str, Any]:
    parameters = only(config, "gla")
    if parameters["gate_rank"] != 16 or parameters["gate_normalizer"] != 16:
        raise ValueError("gla: gate_rank and gate_normalizer must be 16, as in flash-linear-attention")
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_key_value_heads,
        "intermediate_size": config.ffn_hidden_dim,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "expand_k": parameters["expand_k"],
        "expand_v": parameters["expand_v"],
        "clamp_min": parameters["least_log_decay"],
        "feature_map": parameters["feature_map"],
        "use_output_gate": parameters["output_gate"],
    }


def _mamba_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes, parameters = mamba_options(config)
    if config.get("intermediate_size", parameters["expand"] * sizes["model_dim"]) != (
        parameters["expand"] * sizes["model_dim"]
    ):
        raise ValueError(
            f"intermediate_size={config['intermediate_size']} is not reproduced: it must be expand * width"
        )
    return _without_mlp(config, sizes, "mamba", {**parameters, "bias": bool(config.get("use_bias", False))})


def _mamba2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, rms_norm=True)
    sizes, parameters = mamba2_options(config)
    if config["num_heads"] * parameters["head_dim"] != parameters["expand"] * sizes["model_dim"]:
        raise ValueError(f"num_heads={config['num_heads']} is not reproduced: with head_dim it must be expand * width")
    return _without_mlp(config, sizes, "mamba2", {**parameters, "bias": bool(config.get("use_bias", False))})


def _without_mlp(
    config: Mapping[str, Any], sizes: Mapping[str, Any], mixer: str, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        **sizes,
        "ffn_hidden_dim": 0,
        "norm_eps": config["layer_norm_epsilon"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "mixers": mixer,
        "mixer_parameters": {mixer: dict(parameters)},
        **_ends(config),
    }


def _mamba_options(config: KinConfig) -> dict[str, Any]:
    parameters = only(config, "mamba")
    return {
        **_common_options(config, parameters),
        "time_step_rank": parameters["step_rank"] or "auto",
    }


def _mamba2_options(config: KinConfig) -> dict[str, Any]:
    parameters = only(config, "mamba2")
    groups = parameters["groups"]
    if parameters["norm_before_gate"] or (parameters["norm_groups"] or groups) != groups:
        raise ValueError("mamba2: norm_before_gate and norm_groups other than groups are not in Transformers' Mamba2")
    if parameters["norm_eps"] != config.norm_eps:
        raise ValueError(
            f"mamba2: norm_eps={parameters['norm_eps']}: Transformers' Mamba2 has one, the model's norm_eps"
        )
    inner = parameters["expand"] * config.model_dim
    head = parameters["head_dim"] or math.gcd(inner, 64)
    most = parameters["step_most"]
    return {
        **_common_options(config, parameters),
        "n_groups": groups,
        "head_dim": head,
        "num_heads": inner // head,
        "time_step_limit": (parameters["step_least"], math.inf if most is None else most),
    }


def _common_options(config: KinConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if config.ffn_hidden_dim:
        raise ValueError(f"ffn_hidden_dim={config.ffn_hidden_dim}: a Mamba has no feed-forward layer: it must be 0")
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "state_size": parameters["state_size"],
        "expand": parameters["expand"],
        "conv_kernel": parameters["kernel_size"],
        "use_bias": parameters["bias"],
        "use_conv_bias": parameters["conv_bias"],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_ends({name: getattr(config, name) for name in _END_FIELDS}),
    }


_MLP = (("mlp", "feed_forward"), ("model.norm", "model.final_norm"))

_MAMBA_NAMES = (
    ("mixer.norm", "mixer.norm"),
    ("embeddings", "embed_tokens"),
    ("norm_f", "final_norm"),
    ("norm", "mixer_norm"),
)

PEERS: dict[str, Peer] = {
    "llama": Peer(
        _llama_fields,
        _llama_options,
        (
            ("input_layernorm", "mixer_norm"),
            ("post_attention_layernorm", "feed_forward_norm"),
            ("self_attn", "mixer"),
            *_MLP,
        ),
    ),
    "gla": Peer(
        _gla_fields,
        _gla_options,
        (
            ("model.embeddings", "model.embed_tokens"),
            ("attn_norm", "mixer_norm"),
            ("mlp_norm", "feed_forward_norm"),
            ("attn.gk_proj.0", "mixer.decay_down"),
            ("attn.gk_proj.1", "mixer.decay_up"),
            ("attn.g_norm_swish_gate", "mixer.head_norm"),
            ("attn.g_norm", "mixer.head_norm"),
            ("attn", "mixer"),
            *_MLP,
        ),
    ),
    "mamba": Peer(_mamba_fields, _mamba_options, _MAMBA_NAMES, "backbone"),
    "mamba2": Peer(_mamba2_fields, _mamba2_options, _MAMBA_NAMES, "backbone"),
}
"""Model type -> how it stands to the kin."""
