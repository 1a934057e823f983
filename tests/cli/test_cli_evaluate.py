"""`megalodon evaluate perplexity` on real files: reports, plots, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.cli import main
from megalodon.data import ByteTokenizer

TEXT = "So he gave his nose a loud blow, and went in to tea. " * 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = MegalodonConfig(
        **{"num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32},
        **{"vocab_size": 256, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4, "eos_token_id": 0},
    )
    MegalodonForCausalLM(config).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "long.txt").write_text(TEXT)
    (tmp_path / "texts" / "short.txt").write_text(TEXT[:100])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": TEXT[:50]}) + "\n" for _ in range(3)))
    return tmp_path / "texts"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "perplexity", *map(str, arguments)])
    return int(exit.value.code or 0)


def test_folder_of_texts(model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "first"
    assert run(model, texts, "--output", output) == 0
    report = json.loads((output / "perplexity.json").read_text())
    assert [Path(entry["name"]).name for entry in report["documents"]] == ["long.txt", "short.txt"]
    assert report["overall"]["documents"] == 2 and report["overall"]["tokens"] == len(TEXT) + 100 - 2
    assert report["settings"]["tokenizer"] == "bytes" and report["settings"]["piece_length"] == 2048
    assert (output / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["perplexity.json", "perplexity.png"]
    printed = capsys.readouterr().out
    assert f"{report['overall']['bits_per_byte']:.4f}" in printed and "1,024 to 2,048" in printed


def test_rows_and_several_sources(model: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "results"
    rows = texts.parent / "rows.jsonl"
    assert run(model, rows, "--field", "body", "--max-documents", 2, "--output", output, "--piece-length", 7) == 0
    report = json.loads((output / "perplexity.json").read_text())
    assert [entry["tokens"] for entry in report["documents"]] == [49, 49]
    files = (texts / "long.txt", texts / "short.txt")
    assert run(model, *files, "--max-tokens", 80, "--output", output, "--dtype", "bfloat16") == 0
    report = json.loads((output / "perplexity.json").read_text())
    assert [entry["tokens"] for entry in report["documents"]] == [79, 79]
    assert report["settings"]["dtype"] == "bfloat16"


def test_bad_input_is_one_line_that_names_it(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "empty.txt").write_text("")
    for arguments, message in (
        ((model, tmp_path / "missing.txt"), "missing.txt"),
        ((tmp_path / "missing", texts), "no model folder"),
        ((model, tmp_path / "binary"), "binary"),
        ((model, tmp_path / "empty.txt"), "nothing to score"),
        ((model, texts, "--piece-length", 0), "piece_length"),
        ((model, texts, "--output", tmp_path / "binary"), "binary"),
    ):
        assert run(*arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_by_distance_token_by_token_and_what_is_noted(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "README.md").write_text("about")
    (texts / "rows.jsonl").write_text('{"text": "one<|endoftext|>two"}\n{broken\n')
    output, tokens = tmp_path / "out", tmp_path / "tokens.parquet"
    assert run(model, texts, "--skip-bad-rows", "--reset-every", 64, "--tokens-file", tokens, "--output", output) == 0
    captured = capsys.readouterr()
    for part in ("README.md (about the corpus)", "left out 1 bad row", "spells <|endoftext|> 1 time:"):
        assert part in captured.err
    assert "tokens since the cut" in captured.out and "place in the chunk" in captured.out
    report = json.loads((output / "perplexity.json").read_text())
    assert report["settings"]["reset_every"] == 64 and report["by_distance"][-1]["to"] == 64
    assert tokens.stat().st_size > 0
    arguments = (model, texts / "rows.jsonl", "--skip-bad-rows", "--separator", "<|endoftext|>", "--output", output)
    assert run(*arguments) == 0
    report = json.loads((output / "perplexity.json").read_text())
    assert [entry["tokens"] for entry in report["documents"]] == [2, 2]
    assert "spells" not in capsys.readouterr().err
