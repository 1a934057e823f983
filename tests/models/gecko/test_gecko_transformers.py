"""Gecko as Transformers, PEFT and a training step meet it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gecko_cases import BOS, segmented_gecko, tiny_gecko
from model_cases import relative, tiny_model, tokens
from transformers import AutoModelForCausalLM

from megalodon import GeckoForCausalLM, MegalodonForCausalLM


@pytest.mark.parametrize("segments", [False, True])
@torch.no_grad()
def test_greedy_generation_equals_whole_passes(segments: bool) -> None:
    model = (segmented_gecko() if segments else tiny_gecko()).eval()
    prompt = tokens(2, 13)
    prompt[:, 4] = BOS
    generated = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = prompt
    for _ in range(20):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_saved_models_come_back_as_they_were(tmp_path: Path) -> None:
    model, x = tiny_gecko(num_rope_heads=1, layernorm_num_groups=2).eval(), tokens(1, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GeckoForCausalLM)
    assert torch.equal(loaded(x).logits, model(x).logits)
    with pytest.raises(ValueError, match="model_type='gecko': this config is not of a megalodon model"):
        MegalodonForCausalLM.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="model_type='megalodon': this config is not of a gecko model"):
        GeckoForCausalLM.from_pretrained(tmp_path / "other")


def test_adapters_train_and_generate() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model, x = peft.get_peft_model(tiny_gecko(), config), tokens(2, 20)
    model(x, labels=x).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora" in name for name in trained)
    model.eval()
    with torch.no_grad():
        generated = model.generate(input_ids=x, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(generated[:, 20], model(x).logits[:, -1].argmax(-1))


def test_gradient_checkpointing_with_a_carried_state() -> None:
    model, x = tiny_gecko().train(), tokens(2, 40)

    def run() -> dict[str, torch.Tensor]:
        first = model(x[:, :19], labels=x[:, :19], use_cache=True)
        second = model(x[:, 19:], labels=x[:, 19:], past_key_values=first.past_key_values, use_cache=True)
        (first.loss + second.loss).backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    expected = run()
    model.gradient_checkpointing_enable()
    actual = run()
    assert max(relative(actual[name], expected[name]) for name in expected) < 1e-5


def test_dropout_acts_in_training_only() -> None:
    for mode in ("softmax", "dropkey"):
        model = tiny_gecko(dropout=0.2, hidden_dropout=0.2, attention_dropout=0.2, attention_dropout_mode=mode)
        x = tokens(1, 30)
        assert torch.equal(model.eval()(x).logits, model(x).logits)
        model.train()
        assert not torch.equal(model(x).logits, model(x).logits)
        model(x, labels=x).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
