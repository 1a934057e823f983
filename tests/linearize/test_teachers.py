"""Transformers of other libraries, read from their folders as attention kin: the same logits to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megalodon.convert.teachers import Teacher
from megalodon.data import ByteTokenizer
from megalodon.inference import load_model
from megalodon.linearize import read_config, recipe_of
from megalodon.linearize.assembly import assemble

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
}
SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", **SCALED}}),
        ("mistral", {"sliding_window": 9}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
        ("phi", {}),
        ("phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
        ("phi3", {"pad_token_id": 0, "sliding_window": 9}),
    ],
)
@torch.no_grad()
def test_logits_are_the_teachers(model_type: str, options: dict, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**SIZES, **options}), attn_implementation="eager"
    )
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.eval().save_pretrained(tmp_path, max_shard_size="60KB")
    x = torch.randint(0, 97, (2, 100))
    wanted = theirs(x).logits
    teacher = Teacher(tmp_path)
    found = teacher.model()(x).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    if "sliding_attention" in str(teacher.config.mixers):
        return
    # A window that reaches everything is attention itself, whatever the features before it.
    recipe, out = recipe_of("lolcats"), tmp_path / "student"
    config = recipe.student_config(read_config(recipe.config, None, ["window=128"]), teacher.config, [])
    out.mkdir()
    assemble(out, recipe, config, teacher, ByteTokenizer(), {}, [0, 1], 0)
    found = load_model(out, "cpu")(x).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize(
    ("model_type", "options", "told"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "'gpt2': it must be one of llama"),
        ("llama", {**SIZES, "rope_parameters": {"rope_type": "dynamic", **SCALED}}, "rope_type='dynamic' cannot be"),
        ("llama", {**SIZES, "mlp_bias": True}, "mlp_bias=True is not reproduced"),
    ],
)
def test_what_cannot_be_kept_is_named(model_type: str, options: dict, told: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type, **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        Teacher(tmp_path)


def saved(folder: Path, **options: object) -> Path:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SIZES, **options}))
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    """Before any work, whatever is wrong."""
    folder = saved(tmp_path / "shard")
    first = sorted(folder.glob("model-*.safetensors"))[1]
    first.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"lacks {first.name}, which holds"):
        Teacher(folder)
    (tmp_path / "gone").rename(first)
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{first.name} is damaged"):
        Teacher(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="it has no weight_map"):
        Teacher(folder)
    (folder / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Teacher(folder)
    folder = saved(tmp_path / "shape")
    config = json.loads((folder / "config.json").read_text())
    for changed, told in (
        ({"intermediate_size": 96}, r"feed_forward\.\S+ of layer 0 has shape \(.*\): its config says"),
        ({"num_hidden_layers": 3}, r"the weights in .* lack model\.layers\.2"),
        ({"vocab_size": 101}, r"embed_tokens\.weight has shape \(97, 64\): its config says \(101, 64\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config: its"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=told):
            Teacher(folder)


def test_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Teacher(tmp_path)
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        Teacher(tmp_path)
