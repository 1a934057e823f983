"""`megalodon generate` on real files and pipes, resumed runs, and bad input."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.cli import main
from megalodon.data import ByteTokenizer

STORY = "Alice was beginning to get very tired of sitting by her sister on the bank, naïvely. " * 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = MegalodonConfig(
        **{"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32},
        **{"vocab_size": 300, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4, "eos_token_id": 0},
    )
    MegalodonForCausalLM(config).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["generate", *map(str, arguments)])
    return int(exit.value.code or 0)


def text_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_argument_file_and_standard_input_are_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    options = ("--max-tokens", 30, "--seed", 3, "--top-k", 200, "--top-p", 0.99)
    expected = text_of(capsys, model, STORY, *options)
    assert len(expected.encode()) >= 20
    assert text_of(capsys, model, "--prompt-file", tmp_path / "story.txt", *options) == expected
    for dash in (["-"], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STORY.encode())))
        assert text_of(capsys, model, *dash, *options) == expected


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--seed", "8", "--repetition-penalty", "1.2"]])
def test_resumed_run_prints_what_one_run_prints(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    context = tmp_path / "story.context"
    whole = text_of(capsys, model, STORY, "--max-tokens", 50, *options)
    printed = text_of(capsys, model, STORY, "--max-tokens", 19, "--save-context", context, *options)
    options = [option for option in options if option not in ("--seed", "8")]
    resume = ("--context", context, "--save-context", context, *options)
    printed += text_of(capsys, model, *resume, "--max-tokens", 11)
    printed += text_of(capsys, model, "--context", context, "--max-tokens", 20, *options)
    assert printed == whole


def test_context_of_a_prompt_alone_goes_on_with_more_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = tmp_path / "story.context"
    assert text_of(capsys, model, STORY[:777], "--max-tokens", 0, "--save-context", context) == ""
    options = ("--max-tokens", 24, "--temperature", 0)
    assert text_of(capsys, model, STORY[777:], "--context", context, *options) == text_of(
        capsys, model, STORY, *options
    )


def test_stop_strings_end_the_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-tokens", 60, "--seed", 1, "--top-k", 100)
    whole = text_of(capsys, model, STORY, *options)
    assert (
        text_of(capsys, model, STORY, *options, "--stop", whole[10:12], "--stop", "nowhere to be found")
        == (whole[: whole.index(whole[10:12])])
    )


def test_statistics_go_to_standard_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "Hello", "--max-tokens", 3, "--seed", 0, "--dtype", "bfloat16") == 0
    error = capsys.readouterr().err
    assert "prompt: 5 tokens" in error and "generated: 3 tokens" in error and "tokens/s" in error


def test_it_runs_in_a_pipe(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "megalodon",
        "generate",
        str(model),
        "-",
        "--max-tokens",
        "8",
        "--temperature",
        "0",
    ]
    result = subprocess.run(command, input=STORY.encode(), capture_output=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr.decode()
    assert b"prompt: " in result.stderr and b"generated: " in result.stderr


def test_binary_input_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\0b")))
    assert "standard input" in refused(capsys, model, "-")


def test_bad_input_is_one_line_that_names_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model folder" in refused(capsys, tmp_path / "missing", "x")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, tmp_path / "empty", "x")
    assert "no prompt" in refused(capsys, model)
    assert "no prompt" in refused(capsys, model, "")
    assert "--prompt-file" in refused(capsys, model, "x", "--prompt-file", "y")
    assert "no file" in refused(capsys, model, "--prompt-file", tmp_path / "missing.txt")
    assert "temperature is -1.0" in refused(capsys, model, "x", "--temperature", "-1")
    assert "no context file" in refused(capsys, model, "--context", tmp_path / "missing")
    assert "--save-context" in refused(capsys, model, "x", "--save-context", tmp_path / "missing" / "a")
    assert "device 'abacus'" in refused(capsys, model, "x", "--device", "abacus")
    assert "stop string is empty" in refused(capsys, model, "x", "--stop", "")


def test_damaged_weights_are_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(capsys, model, "x")


def test_model_without_a_tokenizer_asks_for_one(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    assert "--tokenizer" in refused(capsys, model, "x")
    assert run(model, "x", "--tokenizer", "bytes", "--max-tokens", 2) == 0
