"""The recurrent and hybrid classes of the installed Transformers, found in its files, and tiny models of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIGNS = re.compile(
    r"ssm_state|recurrent_state|conv_state|rwkv|chunk_gated_delta|linear_attention|lightning|_is_stateful = True"
    r"|xlstm|rg_lru|ShortConv",
    re.IGNORECASE,
)
"""What a file of a class that carries a state from token to token says somewhere."""

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "embedding_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_hidden_size": 32,
    "attention_head_dim": 8,
    "max_position_embeddings": 512,
    "context_length": 512,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_ngroups": 1,
    "mamba_dt_rank": 4,
    "n_mamba_heads": 2,
    "ssm_state_size": 8,
    "lru_width": 32,
    "attention_window_size": 16,
    "sliding_window": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "chunk_size": 8,
    "num_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "residual_in_fp32": False,
    "rescale_every": 0,
}
"""Fields that, where a config has them, make it small."""

_KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, "num_expert_group": 1, "num_key_value_heads": 4}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_KIMI, "layer_group_size": 2, "first_k_dense_replace": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "kimi_linear": _KIMI,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_embed_dim": 16,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "zamba": {
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "kv_channels": 8,
        "num_query_groups": 4,
        "adapter_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 64},  # it rounds widths up to 64ths
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What single classes need besides."""


def recurrent_classes() -> dict[str, str]:
    """Model type -> class, one type a class, of the causal language models that carry a state."""
    root, found = Path(transformers.__file__).parent / "models", {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = model_type_to_module_name(model_type)
        file = root / module / f"modeling_{module}.py"
        if isinstance(name, str) and file.is_file() and SIGNS.search(file.read_text(encoding="utf-8")):
            found.setdefault(name, model_type)
    text = {f"{kind}_text" for kind in found.values()}
    return {
        (f"{kind}_text" if f"{kind}_text" in text and f"{kind}_text" in CONFIG_MAPPING else kind): name
        for name, kind in found.items()
    }


def tiny_model(model_type: str) -> nn.Module:
    """A model of the type with few parameters, all away from their initial values, in evaluation mode."""
    kind = CONFIG_MAPPING[model_type]
    own, default = OWN.get(model_type, {}), kind()
    known = {field.name for field in dataclasses.fields(kind)} - set(kind.attribute_map)
    fields = {name: value for name, value in {**TINY, **own}.items() if name in known or name in own}
    for name in ("layer_types", "layers_block_type"):
        pattern = getattr(default, name, None)
        if name in known and pattern and name not in own:  # each kind of layer, in the order of first appearance
            kinds = list(dict.fromkeys(pattern))
            fields["num_hidden_layers"] = max(4, len(kinds))
            fields[name] = (kinds * 4)[: fields["num_hidden_layers"]]
    config = kind(**fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
