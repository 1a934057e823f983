"""MEGABYTE models of the public re-implementation (MEGABYTE-pytorch) as ours. There is no code of the paper's authors.

Its sampling adds the first patch's context to the start before the first byte, which its training does not. Ours reads
as it trains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megalodon.models.megabyte import MegabyteConfig, MegabyteForCausalLM

LAYER_NAMES = {
    "0.norm.g": "attention_norm.weight",
    "0.to_q.weight": "q_proj.weight",
    "0.to_out.weight": "o_proj.weight",
    "1.0.g": "feed_forward_norm.weight",
    "1.1.weight": "up_proj.weight",
    "1.1.bias": "up_proj.bias",
    "1.4.weight": "down_proj.weight",
    "1.4.bias": "down_proj.bias",
}
"""What a layer's parameters are called there -> here; `to_kv` holds two of ours."""

PATCH_NAMES = {"2": "inner_norm", "3": "project", "4": "outer_norm"}
"""The parts of a patch embedding, there -> here."""


def megabyte_from_reference(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MegabyteForCausalLM:
    """A model with these parameters, which gives the same logits; in evaluation mode.

    Args:
        config: the options of the module there: `num_tokens`, `dim`, `depth`, `max_seq_len`, `dim_head`, `heads`,
            `rel_pos`, `pos_emb`.
        state_dict: its parameters under their names there.

    Raises:
        ValueError: an option is not reproduced, or a parameter is missing or unknown; the message names it.
    """
    for name, wanted in (("attn_dropout", 0.0), ("ff_dropout", 0.0), ("ff_mult", 4)):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name}={config[name]!r} is not reproduced: it must be {wanted}")
    longest, *patches = config["max_seq_len"]
    *coarse, width = config["dim"]
    ours = MegabyteConfig(
        vocab_size=config["num_tokens"],
        model_dim=width,
        coarse_dims=list(coarse),
        depths=list(config["depth"]),
        patch_sizes=list(patches),
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        rope_base=10000.0 if config.get("rel_pos", False) else None,
        max_patches=longest if config.get("pos_emb", False) else None,
    )
    model = MegabyteForCausalLM(ours).eval()
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        renamed |= _ours(name, value, len(config["dim"]))
    tables = [state_dict["token_embs.0.weight"]]
    tables += [state_dict[f"token_embs.{i}.0.weight"] for i in range(1, len(config["dim"]))]
    renamed["model.embed_tokens.weight"] = torch.cat(tables[::-1], dim=1)
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"megabyte: {' '.join(str(error).split())}") from None
    return model


def _ours(name: str, value: Tensor, stages: int) -> dict[str, Tensor]:
    """One of its parameters under our names."""
    kind, _, rest = name.partition(".")
    if kind == "to_logits":
        return {f"lm_head.{rest}": value}
    if kind == "start_tokens":
        return {f"model.stages.{rest}.start": value}
    if kind == "to_next_transformer_projections":
        stage, _, part = rest.split(".")
        return {f"model.stages.{stage}.project.{part}": value}
    number, _, rest = rest.partition(".")
    if kind == "pos_embs":
        return {f"model.stages.{number}.positions": value}
    if kind == "token_embs":
        part, _, which = rest.partition(".")
        if part not in PATCH_NAMES:
            return {}  # a byte embedding: all stand side by side in one table
        return {f"model.stages.{stages - 1 - int(number)}.embed.{PATCH_NAMES[part]}.{which}": value}
    if kind == "transformers" and rest == "norm.g":
        return {f"model.stages.{number}.final_norm.weight": value}
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", rest)
    if kind != "transformers" or found is None:
        raise ValueError(f"megabyte: {name} is no parameter of a model")
    layers = "model.layers" if number == "0" else f"model.finer_layers.{int(number) - 1}"
    layer = f"{layers}.{found[1]}"
    if found[2] == "0.to_kv.weight":
        keys, values = value.chunk(2)
        return {f"{layer}.k_proj.weight": keys, f"{layer}.v_proj.weight": values}
    if found[2] not in LAYER_NAMES:
        raise ValueError(f"megabyte: {name} is no parameter of a model")
    return {f"{layer}.{LAYER_NAMES[found[2]]}": value}
