"""What a user of Transformers expects of a model class: saving, finding, generating, training, adapting, compiling."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TextIteratorStreamer

from megalodon import MegalodonConfig, MegalodonForCausalLM, MegalodonModel, MegalodonState


def tiny(**overrides: Any) -> MegalodonConfig:
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "num_layers": 2,
        "model_dim": 64,
        "z_dim": 32,
        "value_dim": 64,
        "num_heads": 2,
        "ffn_hidden_dim": 64,
        "cema_ndim": 4,
        "chunk_size": 16,
        "norm_num_groups": 4,
        "pad_token_id": 0,
    }
    return MegalodonConfig(**{**fields, **overrides})


@pytest.fixture
def model(seed: None) -> MegalodonForCausalLM:
    return MegalodonForCausalLM(tiny()).eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 97, (batch, length))


def ragged(prompts: list[Tensor], side: str) -> dict[str, Tensor]:
    """Prompts [L_i] of different lengths as one batch padded with 0 on a side."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        input_ids[row, place], attention_mask[row, place] = prompt, 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class Letters:
    """The little that a streamer asks of a tokenizer: id i is the letter number i."""

    def decode(self, ids: list[int] | Tensor, **kwargs: Any) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)


# --- saving and finding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_emb", [False, True])
def test_saved_model_comes_back_through_the_auto_classes(tmp_path: Path, share_emb: bool) -> None:
    model = MegalodonForCausalLM(tiny(share_emb=share_emb, rescale_nffn=True, swiglu=True)).eval()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MegalodonConfig
    assert config.model_dim == config.hidden_size == 64
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is MegalodonForCausalLM
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    x = tokens(2, 40)
    assert torch.equal(again(x).logits, model(x).logits)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    assert type(backbone) is MegalodonModel
    assert torch.equal(backbone(x).last_hidden_state, model.model(x).last_hidden_state)


def test_tied_head_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = MegalodonForCausalLM(tiny(share_emb=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = MegalodonForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.num_parameters() == model.num_parameters()


def test_bfloat16_loads_with_its_recurrence_in_float32(model: MegalodonForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    half = MegalodonForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.layers[0].cema.alpha.dtype == torch.float32
    x = tokens(2, 40)
    logits = half(x).logits
    assert logits.dtype == torch.float32
    # bfloat16 keeps 8 bits: a few units in the last place after two layers
    torch.testing.assert_close(logits, model(x).logits, rtol=0.05, atol=0.05)
    assert half.generate(x, max_new_tokens=4, do_sample=False).shape == (2, 44)
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert fresh.dtype == torch.bfloat16
    assert {weight.dtype for weight in fresh.model.layers[0].cema.parameters()} == {torch.float32}


def test_float16_is_refused_on_loading_and_on_running(model: MegalodonForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"float16.*use bfloat16 or float32"):
        MegalodonForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"float16.*use bfloat16 or float32"):
        model.half()(tokens(1, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layer": 2}, "num_layer=2.*did you mean num_layers"),
        ({"num_layers": "two"}, "num_layers.*expected int"),
        ({"hidden_size": 0}, "model_dim=0"),
        ({"attention_dropout_mode": "keys"}, "attention_dropout_mode"),
        ({"z_dim": 33}, "z_dim=33 is not divisible by num_heads=2"),
    ],
)
def test_bad_config_is_one_value_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny(**fields)
    assert "\n" not in str(caught.value)


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_each_row_what_it_gives_alone(model: MegalodonForCausalLM, side: str) -> None:
    prompts = [tokens(1, length)[0] for length in (5, 37, 16, 1)]
    batch = ragged(prompts, side)
    out = model(**batch, use_cache=True)
    for row, prompt in enumerate(prompts):
        alone = model(prompt[None], use_cache=True)
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(out.logits[row, real], alone.logits[0], rtol=1e-5, atol=1e-5)
        mine, theirs = out.past_key_values[row].state_dict(), alone.past_key_values.state_dict()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# --- generation -----------------------------------------------------------------------------------------------------


def greedy_by_hand(model: MegalodonForCausalLM, prompt: Tensor, count: int) -> Tensor:
    """Greedy continuation [B, L + count], each token from a fresh pass over the whole text."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@torch.no_grad()
def test_greedy_equals_recomputing_everything(model: MegalodonForCausalLM) -> None:
    prompt = tokens(2, 11)
    expected = greedy_by_hand(model, prompt, 24)  # crosses two chunk boundaries
    for arguments in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(prompt, max_new_tokens=24, do_sample=False, **arguments), expected), arguments


@torch.no_grad()
def test_left_padded_prompts_continue_as_each_alone(model: MegalodonForCausalLM) -> None:
    prompts = [tokens(1, length)[0] for length in (3, 30, 16)]
    together = model.generate(**ragged(prompts, "left"), max_new_tokens=20, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 30:], greedy_by_hand(model, prompt[None], 20)[0, len(prompt) :])


@torch.no_grad()
def test_beam_search_score_is_the_likelihood_of_what_it_returns(model: MegalodonForCausalLM) -> None:
    prompt = tokens(2, 13)
    out = model.generate(
        prompt, num_beams=4, max_new_tokens=8, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    log_probs = model(out.sequences).logits.log_softmax(-1)[:, 12:-1]
    likelihood = log_probs.gather(-1, out.sequences[:, 13:, None]).sum((1, 2))
    # A beam that had kept another beam's state would have other likelihoods.
    torch.testing.assert_close(out.sequences_scores, likelihood, rtol=1e-4, atol=1e-4)
    best = greedy_by_hand(model, prompt, 8)
    greedy = model(best).logits.log_softmax(-1)[:, 12:-1].gather(-1, best[:, 13:, None]).sum((1, 2))
    assert (likelihood > greedy - 1e-4).all()


@torch.no_grad()
def test_sampling_follows_its_seed(model: MegalodonForCausalLM) -> None:
    prompt = tokens(1, 9)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(
            prompt, do_sample=True, top_p=0.9, temperature=1.2, num_return_sequences=3, max_new_tokens=9
        )

    assert sample(1).shape == (3, 18)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("pads", [0, 3], ids=["whole", "padded"])
def test_generation_goes_on_from_a_state(model: MegalodonForCausalLM, arguments: dict[str, Any], pads: int) -> None:
    text = tokens(2, 30)
    mask = torch.ones_like(text)
    mask[:, :pads] = 0  # in every row: the state has read fewer tokens than columns
    expected = model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=False, **arguments)
    state = model(text[:, :21], attention_mask=mask[:, :21], use_cache=True).past_key_values
    before = state.clone().state_dict()
    new_only = {"input_ids": text[:, 21:], "attention_mask": mask, "past_key_values": state}
    for inputs in ({**new_only, "input_ids": text}, new_only):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, **arguments)
        assert torch.equal(out[:, -8:], expected[:, -8:])
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)


@torch.no_grad()
def test_returned_state_is_that_of_the_text(model: MegalodonForCausalLM) -> None:
    out = model.generate(tokens(2, 20), max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, MegalodonState)
    read = model(out.sequences[:, :-1], use_cache=True).past_key_values
    torch.testing.assert_close(out.past_key_values.state_dict(), read.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_state_without_its_text_is_refused(model: MegalodonForCausalLM) -> None:
    state = model(tokens(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has read 20 tokens, input_ids has 5: give the whole text"):
        model.generate(tokens(1, 5), past_key_values=state, max_new_tokens=2)


def test_transformers_caches_are_refused(model: MegalodonForCausalLM) -> None:
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(tokens(1, 5), cache_implementation="static", max_new_tokens=2)


@torch.no_grad()
def test_the_state_has_both_of_transformers_names(
    model: MegalodonForCausalLM, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    text = tokens(1, 20)
    for run in (model, model.model):
        state = run(text, use_cache=True).past_key_values
        old = run(text, past_key_values=state, use_cache=True)
        new = run(text, cache=state, use_cache=True)
        assert torch.equal(old[0], new[0]) and int(new.cache.position) == 40
        assert new.past_key_values is new.cache and state is not new.cache
        with pytest.raises(ValueError, match="give past_key_values or cache, and not both"):
            run(text, past_key_values=state, cache=state)
        with pytest.raises(ValueError, match="memory is a MegalodonState: give it as past_key_values or cache"):
            run(text, memory=state)
    model.generate(text, max_new_tokens=2)
    said = [capfd.readouterr().err, *(str(warning.message) for warning in recwarn)]
    assert not [words for words in said if "past_key_values" in words], "Transformers has nothing to complain of"


def test_strings_stop_a_generation(model: MegalodonForCausalLM) -> None:
    """`generate` needs the tokenizer for them, and passes it on to the model as well."""
    from megalodon.data.byte_transformers import byte_tokenizer_for_transformers

    tokenizer, ids = byte_tokenizer_for_transformers(), tokens(1, 5)
    given = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **given)
    string = tokenizer.decode(whole[0, 9:11])
    for beams in (1, 2):
        options = {**given, "num_beams": beams}
        out = model.generate(ids, stop_strings=[string], tokenizer=tokenizer, **options)
        assert string in tokenizer.decode(out[0]) or torch.equal(out, model.generate(ids, **options))
        assert out.shape[1] <= 11 or beams > 1


def test_a_prompt_without_tokens_is_refused(model: MegalodonForCausalLM) -> None:
    with pytest.raises(ValueError, match="input_ids has no token: give a prompt"):
        model.generate(tokens(1, 0), max_new_tokens=2)


def test_streamer_receives_the_generated_text(model: MegalodonForCausalLM) -> None:
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=600)  # type: ignore[arg-type]
    prompt = tokens(1, 6)
    arguments = {"streamer": streamer, "max_new_tokens": 12, "do_sample": False}
    thread = Thread(target=model.generate, args=(prompt,), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    with torch.no_grad():
        assert text == Letters().decode(greedy_by_hand(model, prompt, 12)[0, 6:])


# --- training -------------------------------------------------------------------------------------------------------


def test_labels_are_shifted_inside_and_averaged_as_everywhere(model: MegalodonForCausalLM) -> None:
    x = tokens(2, 20)
    labels = x.masked_fill(torch.rand(2, 20) < 0.3, -100)
    out = model(x, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=10).loss, expected * count / 10)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    lean = model(x, shift_labels=shifted, return_logits=False)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    model = MegalodonForCausalLM(tiny(dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1)).train()
    x = tokens(2, 40)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(x, labels=x).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.model.layers[0].memory_norm.register_forward_hook(count)
    torch.testing.assert_close(gradients(), expected)
    handle.remove()
    assert calls == 2  # forward, and again in the backward pass


def test_gradient_checkpointing_carries_the_state() -> None:
    model = MegalodonForCausalLM(tiny()).train()
    x = tokens(2, 40)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        first = model(x[:, :19], use_cache=True)
        model(x[:, 19:], labels=x[:, 19:], past_key_values=first.past_key_values).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)


def test_trainer_takes_steps_evaluates_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        batch = ragged(rows, "right")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    model = MegalodonForCausalLM(tiny())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [tokens(1, length)[0] for length in (20, 33, 9, 40, 17, 25, 31, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    assert trainer.model_accepts_loss_kwargs
    with torch.no_grad():
        batch = collate(rows)
        expected = float(model.eval()(**batch).loss)
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(expected, rel=0.2)  # a mean of batches' means
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(expected, rel=0.2)  # neither summed nor divided once more by the accumulation
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    trainer.save_model()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MegalodonForCausalLM


def test_lora_adapts_every_linear_layer(model: MegalodonForCausalLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    x = tokens(2, 40)
    plain = model(x).logits.detach()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config).train()
    adapted(input_ids=x, labels=x).loss.backward()
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    names = ("z_proj", "v_proj", "r_proj", "h_proj", "o_proj", "up_proj", "down_proj")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable} == set(names)
    # B starts at 0, so only B has a gradient at first: a layer whose adapter is bypassed would have none.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in trainable.items() if "lora_B" in name)
    with torch.no_grad():
        for name, p in trainable.items():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    adapted.eval()
    changed = adapted(input_ids=x).logits.detach()
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert adapted.generate(input_ids=x, max_new_tokens=3, do_sample=False).shape == (2, 43)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(adapted.merge_and_unload()(x).logits, changed, rtol=1e-4, atol=1e-4)


def test_traced_model_computes_the_same() -> None:
    model = MegalodonForCausalLM(tiny(num_layers=1)).eval()
    x = tokens(2, 20)
    traced = torch.compile(model, backend="eager")  # what Dynamo makes of the code, without the minutes of Inductor
    torch.testing.assert_close(traced(x, labels=x).loss, model(x, labels=x).loss)


@pytest.mark.slow
def test_compiled_model_trains(model: MegalodonForCausalLM) -> None:
    x = tokens(2, 40)
    model(x, labels=x).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model)(x, labels=x).loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
