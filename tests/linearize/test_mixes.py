"""Every recipe on teachers that have it all: grouped heads, biases, tied matrices, norms of heads, half precision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megalodon.data import ByteTokenizer
from megalodon.inference import load_model
from megalodon.linearize import linearize, plan, read_config, recipe_of

TEACHERS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "qwen3": ({"head_dim": 16, "tie_word_embeddings": True}, torch.bfloat16),
    "llama": ({"attention_bias": True}, torch.float16),
    "phi": ({"qk_layernorm": True}, torch.float32),
}
RECIPES = {
    "gecko": ["chunk_size=4"],
    "lolcats": ["window=8"],
    "hedgehog": [],
    "supra": [],
    "mohawk": ["state_size=8"],
    "lizard": ["window=8"],
    "distill": ["mix=true"],
}


def made(model_type: str, folder: Path) -> Path:
    options, dtype = TEACHERS[model_type]
    tokenizer = ByteTokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": tokenizer.vocab_size, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TEACHERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_from_teacher_to_model(recipe: str, model_type: str, given: list[str], tmp_path: Path) -> None:
    teacher, chosen = made(model_type, tmp_path / "teacher"), recipe_of(recipe)
    before, keys = digest(teacher), [*given, *RECIPES[recipe]]
    settings = read_config(chosen.config, None, keys)
    keys += [f"{name}.tokens=128" for name in settings.stage_sections()]
    job = plan(teacher, tmp_path / "out", chosen, read_config(chosen.config, None, keys))
    assert not linearize(job)
    assert digest(teacher) == before
    model = load_model(tmp_path / "out", "cpu", torch.float32)
    x = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        whole = model(x, use_cache=True)
        state, logits = model(x[:, :10], use_cache=True).past_key_values, []
        for token in x[:, 10:].split(1, dim=1):
            out = model(token, past_key_values=state, use_cache=True)
            state = out.past_key_values
            logits.append(out.logits)
    assert whole.logits.isfinite().all()
    assert (torch.cat(logits, 1) - whole.logits[:, 10:]).abs().max() < 1e-4 * whole.logits.abs().max()
