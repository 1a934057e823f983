"""Folders, configs, heads and refusals, as Transformers, PEFT and torchao ask for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility_cases import byte_tokenizer, tiny, tiny_config
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.models import ARCHITECTURES

IDS = torch.randint(3, 90, (2, 21), generator=torch.Generator().manual_seed(4))
SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(code: str, *path: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own that has not imported us."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_process_that_never_imported_us_loads_a_trusted_folder(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    code = f"""
import sys
from transformers import AutoConfig, AutoModelForCausalLM
assert "megalodon" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("megalodon."), type(model)
model.save_pretrained({str(tmp_path / "again")!r})
print(sorted(path.name for path in __import__("pathlib").Path({str(tmp_path / "again")!r}).iterdir()))
"""
    done = run(code, str(SOURCE))
    assert done.returncode == 0, done.stderr[-2000:]
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_megalodon_lm.py"]
    assert done.stdout.strip().endswith(str(names))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_without_the_package_the_folder_says_what_to_install(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    broken = tmp_path / "shadow" / "megalodon"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('not here')")
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    done = run(code, str(broken.parent))
    assert done.returncode != 0 and "pip install megalodon-lm" in done.stderr


def test_a_card_is_written_once(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation")
    assert "pip install megalodon-lm" in card and '"chunk_size": 16' in card and "auto_map" not in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("key", ["author", "max_position_embeddings", "tokenizer_class", "sliding_window", "num_layer"])
def test_whatever_was_set_on_a_config_comes_back_with_a_warning(key: str, tmp_path: Path) -> None:
    model = tiny()
    setattr(model.config, key, 4096)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"{key}=4096 in a saved config is no field of a megalodon config"):
        config = AutoConfig.from_pretrained(tmp_path)
    assert getattr(config, key) == 4096 and config.num_layers == 2


def test_labels_of_a_head_come_back_without_a_word_and_a_misspelt_field_does_not(tmp_path: Path) -> None:
    config = tiny_config()
    config.id2label = {0: "bad", 1: "good"}
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "bad", 1: "good"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "megalodon", "num_layer": 2}))
    with pytest.raises(ValueError, match=r"num_layer=2.*did you mean num_layers"):
        AutoConfig.from_pretrained(tmp_path)


def test_fields_answer_to_both_names_and_are_listed_once() -> None:
    config = tiny_config()
    fields = config.to_dict()
    assert "hidden_size" in fields and fields["hidden_size"] == fields.get("hidden_size") == fields["model_dim"] == 64
    assert fields["num_hidden_layers"] == 2 and "hidden_size" not in list(fields) and "hidden" not in fields
    assert MegalodonConfig(**{**fields, "model_dim": 128}).hidden_size == 128


# --- what libraries look up -----------------------------------------------------------------------------------------


def test_label_smoothing_trains_on_the_next_token(tmp_path: Path) -> None:
    model = tiny()
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, **options)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS})
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["embed_tokens", "v_proj"]),
        LoraConfig(target_modules=["v_proj"], trainable_token_indices=[3, 4]),
        LoraConfig(target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["lora", "tokens", "saved", "prompt", "p-tuning"],
)
def test_peft_reaches_the_embedding(config: Any) -> None:
    adapted = get_peft_model(tiny(), config)
    adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is not None]
    assert trained
    out = adapted.eval().generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert out.shape == (2, 25)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_labels_are_read_at_the_last_token(side: str, tmp_path: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    padded = torch.zeros(2, 30, dtype=torch.long)
    place = slice(9, None) if side == "left" else slice(21)
    padded[:, place] = IDS
    out = head(padded, attention_mask=(padded != 0).long(), labels=torch.tensor([0, 2]))
    expected = head.score(base.model(IDS).last_hidden_state[:, -1])
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    head.save_pretrained(tmp_path / "head")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(again(padded).logits, head(padded).logits) and again.config.num_labels == 3
    assert "text-classification" in (tmp_path / "head" / "README.md").read_text()


def test_token_labels(tmp_path: Path) -> None:
    head = AutoModelForTokenClassification.from_config(tiny_config(num_labels=5)).eval()
    labels = torch.randint(0, 5, IDS.shape)
    out = head(IDS, labels=labels, num_items_in_batch=7)
    assert out.logits.shape == (*IDS.shape, 5)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    with pytest.raises(TypeError, match="head_mask"):
        head(IDS, head_mask=None)


def test_every_architecture_has_its_classes() -> None:
    for kind in ARCHITECTURES.values():
        auto_map = kind.config.auto_map
        assert auto_map["AutoModelForCausalLM"] == f"modeling_megalodon_lm.{kind.causal_lm.__name__}"
        assert {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"} <= auto_map.keys()


# --- passes and weights that are not plain --------------------------------------------------------------------------


def test_continuous_batching_is_refused_at_once() -> None:
    model = tiny()
    for call in (
        lambda: model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=3)),
        lambda: model.generate(IDS, cache_implementation="paged", max_new_tokens=3),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=r"memory is (a|the model's) state"):
            call()


@torch.no_grad()
def test_crop_says_what_it_can_do() -> None:
    model = tiny()
    state = model(IDS, use_cache=True).past_key_values
    before = state.clone()
    state.crop(21)
    state.crop(99)
    assert repr(state) == repr(before)
    for length in (20, -1, 3, -22):
        with pytest.raises(ValueError, match=rf"crop\({length}\): a state that has read 21 tokens cannot unread"):
            state.crop(length)
    state.crop(0)
    assert state.get_seq_length() == 0
    torch.testing.assert_close(model(IDS, past_key_values=state).logits, model(IDS).logits)
    before.crop(-21)
    assert before.get_seq_length() == 0


@torch.no_grad()
def test_nothing_is_run_on_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    lengths = []
    for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        layer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[-2]))
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    out = model(IDS[:, :0], use_cache=True)
    assert out.logits.shape == (2, 0, model.vocab_size) and 0 not in lengths
    torch.testing.assert_close(model(IDS, past_key_values=out.past_key_values).logits, model(IDS).logits)


WIDE = {"model_dim": 128, "z_dim": 64, "value_dim": 128, "ffn_hidden_dim": 128}
GENERATED = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Int8WeightOnlyConfig", {}),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int8}),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
        ("Float8WeightOnlyConfig", {}),
        ("Int8DynamicActivationInt8WeightConfig", {}),
        ("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": torch.int4}),
    ],
)
def test_torchao_weights_decode_as_they_read_and_load_again(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    tiny(**WIDE).save_pretrained(tmp_path / "model")
    config = TorchAoConfig(getattr(quantization, name)(**options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config).eval()
    assert type(model.lm_head.weight) is torch.nn.Parameter and "torchao" in type(model_weight(model)).__module__
    out = model.generate(IDS, **GENERATED)
    assert model(IDS[:, :0], use_cache=True).past_key_values.get_seq_length() == 0
    if "Dynamic" not in name:  # whose rounding of activations depends on how many there are
        whole = model(out.sequences[:, :-1], use_cache=False).logits[:, -8:]
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def model_weight(model: MegalodonForCausalLM) -> torch.Tensor:
    return next(module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))


@torch.no_grad()
def test_torchao_int4_for_gpus_decodes_or_is_refused_by_torchao_itself() -> None:
    """`Int4WeightOnlyConfig` needs a library of its own, which torchao asks for before it touches a weight."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny(**WIDE)
    before = model(IDS).logits
    try:
        quantization.quantize_(model, quantization.Int4WeightOnlyConfig())
    except ImportError as reason:
        assert "mslk" in str(reason)
        assert torch.equal(model(IDS).logits, before)
    else:
        out = model.generate(IDS, **GENERATED)
        whole = model(out.sequences[:, :-1], use_cache=False).logits[:, -8:]
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_an_embedding_that_lies_on_the_disk(tmp_path: Path) -> None:
    model = tiny()
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.final_norm": "cpu", "lm_head": "cpu"}
    offloaded = MegalodonForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    assert offloaded.model.embed_tokens.weight.device.type == "meta"
    assert torch.equal(offloaded.eval().generate(IDS, max_new_tokens=5, do_sample=False), expected)


def test_a_tokenizer_is_found_in_the_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == byte_tokenizer()("ab").input_ids


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fields", [{}, {"norm_prior_count": 2, "swiglu": True, "rescale_nffn": True}])
def test_an_exported_forward_pass_is_exact_at_any_length(strict: bool, fields: dict[str, Any]) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny(**fields)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    model = Logits()
    anywhere = ({1: torch.export.Dim("length", min=2, max=1 << 20)},)
    program = torch.export.export(model, (IDS,), dynamic_shapes=anywhere, strict=strict).module()
    for length in (2, 16, 17, 100, 4500):
        x = torch.randint(3, 90, (2, length))
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
