"""Which tensor of ours is which tensor of the reference implementation: names, shapes, and how a split model cuts them.

One table serves both directions, the checks of shape, and the merging and cutting of model-parallel checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.megalodon.config import MegalodonConfig

AnyConfig = MegalodonConfig | GeckoConfig
"""The config of an architecture whose authors' checkpoints we read and write."""

ROWS, COLUMNS, WHOLE = 0, 1, None


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of the reference's state dict.

    `split` is the axis that model-parallel ranks divide among themselves, in rank order; None where every rank holds
    the whole tensor. A plain `Stored` is a buffer, which follows from the config.
    """

    reference: str
    shape: Shape
    split: int | None


@dataclass(frozen=True)
class Parameter(Stored):
    """One parameter under both names."""

    ours: str


def parameters(config: AnyConfig) -> list[Parameter]:
    """Every parameter of a model of this config, in the reference's order."""
    output_size = config.output_size or config.vocab_size
    table = [
        Parameter("embed.weight", (config.vocab_size, config.model_dim), COLUMNS, "model.embed_tokens.weight"),
    ]
    for index in range(config.num_layers):
        table += _layer(config, f"model.layers.{index}.", f"layers.{index}.")
    table += _timestep_norm(config, "model.final_norm.", "output.final_norm.")
    if not config.share_emb:
        shape = (output_size, config.model_dim)
        table.append(Parameter("output.output.weight", shape, COLUMNS, "lm_head.weight"))
    return table


def buffers(config: AnyConfig) -> list[Stored]:
    """Every buffer that the reference's state dict holds for this config."""
    table = []
    if not isinstance(config, GeckoConfig) or config.rotated_heads:
        table.append(Stored("rope.freqs", (config.z_dim // config.num_heads // 2,), WHOLE))
    norms = [f"layers.{index}.mega.timenorm." for index in range(config.num_layers)] + ["output.final_norm."]
    for norm in norms:
        table.append(Stored(norm + "prior_count", (), WHOLE))
        if prior_count(config) == 0:
            spread = "prior_var" if isinstance(config, GeckoConfig) else "prior_logv"
            table.append(Stored(norm + "prior_mean", (config.norm_num_groups,), ROWS))
            table.append(Stored(norm + spread, (config.norm_num_groups,), ROWS))
    return table


def prior_count(config: AnyConfig) -> int:
    """Tokens that the norms over time imagine before the first. Gecko's have no parameters for them."""
    return 0 if isinstance(config, GeckoConfig) else config.norm_prior_count


def _layer(config: AnyConfig, ours: str, reference: str) -> list[Parameter]:
    model, z, value, hidden = config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim
    components = config.cema_ndim
    gecko = isinstance(config, GeckoConfig)
    last: Shape = () if gecko else (1,)
    qk: Shape = (4 if gecko else 2, z)
    rows: list[tuple[str, str, Shape, int | None]] = [
        ("attention.qk_weight", "mega.gamma", qk, COLUMNS),
        ("attention.qk_bias", "mega.beta", qk, COLUMNS),
        ("cema.alpha", "mega.cema.alpha", (model, components, *last), ROWS),
        ("cema.delta", "mega.cema.delta", (model, components, *last), ROWS),
        ("cema.theta", "mega.cema.theta", (model, *last, *last), ROWS),
        ("cema.gamma", "mega.cema.gamma", (model, components, 2), ROWS),
    ]
    if not gecko:
        rows.append(("cema.omega", "mega.cema.omega", (model, 1), ROWS))
    rows += [
        ("attention.v_proj.weight", "mega.wv.weight", (value, model), ROWS),
        ("attention.v_proj.bias", "mega.wv.bias", (value,), ROWS),
        ("attention.z_proj.weight", "mega.wz.weight", (z, model), ROWS),
        ("attention.z_proj.bias", "mega.wz.bias", (z,), ROWS),
        ("attention.r_proj.weight", "mega.wr.weight", (value, model), ROWS),
        ("attention.r_proj.bias", "mega.wr.bias", (value,), ROWS),
        ("attention.h_proj.weight", "mega.wh1.weight", (model, model), ROWS),
        ("attention.h_proj.bias", "mega.wh1.bias", (model,), ROWS),
        ("attention.o_proj.weight", "mega.wh2.weight", (model, value), COLUMNS),
        ("feed_forward.up_proj.weight", "nffn.fc1.weight", (hidden, model), ROWS),
        ("feed_forward.down_proj.weight", "nffn.fc2.weight", (model, hidden), COLUMNS),
    ]
    if config.swiglu:
        rows.append(("feed_forward.gate_proj.weight", "nffn.fc3.weight", (hidden, model), ROWS))
    if config.norm_affine:
        rows += [
            ("memory_norm.weight", "mega.rmsnorm.weight", (model,), WHOLE),
            ("feed_forward.norm.weight", "nffn.norm.weight", (model,), WHOLE),
            ("feed_forward.norm.bias", "nffn.norm.bias", (model,), WHOLE),
        ]
    if config.rescale_nffn:
        rows.append(("feed_forward.alpha", "nffn.alpha", (model,), WHOLE))
    norm = _timestep_norm(config, ours + "timestep_norm.", reference + "mega.timenorm.")
    return [Parameter(reference + theirs, shape, split, ours + name) for name, theirs, shape, split in rows] + norm


def _timestep_norm(config: AnyConfig, ours: str, reference: str) -> list[Parameter]:
    shapes = {"weight": config.model_dim, "bias": config.model_dim}
    if prior_count(config) > 0:
        shapes |= {"prior_mean": config.norm_num_groups, "prior_logv": config.norm_num_groups}
    return [Parameter(reference + name, (size,), ROWS, ours + name) for name, size in shapes.items()]
