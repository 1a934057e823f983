"""A Transformer as it is, with attention to the keys that a search finds: nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megalodon.cli import main
from megalodon.convert.teachers import Teacher
from megalodon.data import ByteTokenizer

SMALL = {"mask_size": 8, "query_block": 4, "key_block": 2, "window": 6, "sinks": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("llama"), ByteTokenizer()
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, intermediate_size=48, initializer_range=0.3, eos_token_id=256, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@torch.no_grad()
def test_what_sees_everything_is_the_teacher(llama: Path) -> None:
    x = torch.randint(0, 256, (2, 70))
    wanted = AutoModelForCausalLM.from_pretrained(llama)(x).logits
    for name, parameters in (
        ("attention", {}),
        ("hip", {**SMALL, "mask_size": 64}),
        ("hip", {**SMALL, "mask_size": 0, "window": 70}),
        ("sliding_attention", {"window": 70}),
    ):
        found = Teacher(llama).with_attention(name, parameters).model()(x).logits
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), name
    less = Teacher(llama).with_attention("hip", SMALL).model()(x).logits
    assert (less[:, :6] - wanted[:, :6]).norm() < 1e-5 * wanted.norm()
    assert (less[:, 60:] - wanted[:, 60:]).norm() > 1e-2 * wanted.norm()


@torch.no_grad()
def test_without_a_search_there_are_sinks_and_a_window(llama: Path) -> None:
    """A query sees the first keys, and those from `window` before the first query of its block."""
    teacher = Teacher(llama).with_attention("hip", {**SMALL, "mask_size": 0, "key_block": 1})
    model = teacher.model()
    x = torch.randint(0, 256, (1, 50))
    block = torch.arange(50) // 4 * 4
    key, query = torch.arange(50), torch.arange(50)[:, None]
    seen = (key <= query) & ((key < 2) | (key >= block[:, None] + 1 - 6))
    theirs = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    wanted = theirs(x, attention_mask=torch.zeros(1, 1, 50, 50).masked_fill(~seen, -torch.inf)).logits
    found = model(x).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    state = model(x[:, :23], use_cache=True).past_key_values
    rest = model(x[:, 23:], past_key_values=state).logits
    assert (rest - wanted[:, 23:]).norm() < 1e-5 * wanted.norm()


def test_layers_with_windows_of_their_own_keep_them(llama: Path) -> None:
    teacher = Teacher(llama)
    own = {"name": "sliding_attention", "window": 9}
    teacher.config.mixers, teacher.config.mixer_parameters = ["attention", own], None
    changed = teacher.with_attention("hip", SMALL).config
    assert changed.mixer_of(0)[0] == "hip" and changed.mixer_of(1)[1].window == 9
    assert teacher.config.mixer_of(0)[0] == "attention", "the teacher is as it was"


def test_the_command(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in llama.iterdir()}
    arguments = ["generate", str(llama), "Once upon a time, " * 4, "--max-tokens", "8", "--temperature", "0"]
    hip = [*arguments, "--attention", "hip"]
    small = [f"--attention-parameter={name}={value}" for name, value in SMALL.items()]

    def text(*given: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(given))
        assert not ended.value.code
        return capfd.readouterr().out

    whole = text(*hip)  # all is within the window of the defaults
    assert whole == text(*arguments, "--attention", "attention")
    assert text(*hip, *small) != whole
    saved = [*hip, *small, "--save-context", str(tmp_path / "saved")]
    begun = text(*saved)
    with pytest.raises(SystemExit):
        main(["generate", str(llama), "--context", str(tmp_path / "saved"), "--attention", "hip"])
    assert "another model" in capfd.readouterr().err, "other keys would be found"
    context = ["generate", str(llama), "--context", str(tmp_path / "saved"), "--max-tokens", "4", "--temperature", "0"]
    longer = [*hip, *small]
    longer[longer.index("8")] = "12"
    assert begun + text(*context, "--attention", "hip", *small) == text(*longer)
    assert {file.name: file.stat().st_mtime_ns for file in llama.iterdir()} == before


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--attention", "hipp"], "attention is 'hipp': with a model's own weights it must be attention, hip"),
        (["--attention", "hip", "--attention-parameter", "mask=3"], "mask"),
        (["--attention", "hip", "--attention-parameter", "mask_size"], "mask_size: it must be KEY=VALUE"),
        (["--attention", "hip", "--attention-parameter", "window=0"], "window=0: it must be at least 1"),
        (["--attention", "hip", "--dtype", "int8"], "float32 or bfloat16"),
        (["--attention-parameter", "window=3"], "it goes with --attention"),
    ],
)
def test_bad_input(given: list[str], told: str, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(llama), "text", *given])
    assert ended.value.code == 2 and told in capfd.readouterr().err
