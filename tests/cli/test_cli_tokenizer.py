"""`megalodon tokenizer` on real files."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from megalodon.cli import main
from megalodon.data import load_tokenizer

TEXT = "def double(number):\n    return number + number\n\n" * 200


def run(*arguments: object) -> None:
    try:
        main(["tokenizer", *map(str, arguments)])
    except SystemExit as end:
        if end.code:
            raise


def test_trains_and_saves_a_tokenizer_that_transformers_loads(tmp_path, capsys):
    (tmp_path / "a.py").write_text(TEXT)
    run(tmp_path / "a.py", tmp_path / "new" / "bpe", "--vocab-size", 280)
    printed = capsys.readouterr().out
    assert "280 ids" in printed
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "new" / "bpe"), load_tokenizer(tmp_path / "new" / "bpe")
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).tolist()
    assert ours.decode(ours.encode(TEXT)) == TEXT and len(ours.encode(TEXT)) < len(TEXT) / 2


def test_reads_a_named_field_and_says_when_the_text_gives_fewer_ids(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"code": TEXT, "text": "zzz"}) + "\n" for _ in range(2)))
    run(tmp_path / "rows.jsonl", tmp_path / "bpe", "--field", "code", "--vocab-size", 5000)
    assert "fewer ids than 5000" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "bpe")
    assert len(tokenizer.encode("number")) == 1 and len(tokenizer.encode("zzz")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none.txt", "{folder}/out"], "no such file or folder"),
        (["{folder}/a.txt", "{folder}"], "exists already"),
        (["{folder}/a.txt", "{folder}/out", "--vocab-size", "12"], "vocab_size is 12; it must be 257 or more"),
        (["{folder}/a.txt", "{folder}/out", "--kind", "pdf"], "kind"),
        (["{folder}/a.txt", "{folder}/out", "--split", "train"], "split only has a meaning"),
        (["{folder}/empty.txt", "{folder}/out"], "no text to learn"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments, message):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as end:
        run(*(argument.format(folder=tmp_path) for argument in arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
