"""Corpora: every kind of source is found, ordered and read exactly; what is not text is refused with its name."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from megalodon.data import Corpus, CorpusConfig, TextFile, read_text


def texts(**config) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in Corpus(config).documents()]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_file_folder_glob_and_list_give_sorted_documents(tmp_path):
    b, a = write(tmp_path / "x" / "b.txt", "B\r\n"), write(tmp_path / "x" / "a.txt", "Ä")
    deep = write(tmp_path / "x" / "sub" / "c.md", "C")
    write(tmp_path / "x" / ".hidden" / "d.txt", "D")
    assert texts(source=str(b)) == [(str(b), "B\r\n")]
    assert texts(source=str(tmp_path / "x")) == [(str(a), "Ä"), (str(b), "B\r\n"), (str(deep), "C")]
    assert texts(source=str(tmp_path / "x" / "*.txt")) == [(str(a), "Ä"), (str(b), "B\r\n")]
    assert texts(source=str(tmp_path / "**" / "*.md")) == [(str(deep), "C")]
    listed = texts(source=[str(deep), str(b), str(tmp_path / "x" / "*.txt")])
    assert [name for name, _ in listed] == [str(deep), str(b), str(a)]
    assert len(texts(source=str(tmp_path / "x"), max_documents=2)) == 2


def test_jsonl_and_parquet_take_the_named_field(tmp_path):
    rows = [{"body": "one\n", "n": 1}, {"body": "zwei Ü", "n": 2}]
    jsonl = write(tmp_path / "a.jsonl", json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]))
    parquet = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    expected = [
        (f"{jsonl}:1", "one\n"),
        (f"{jsonl}:3", "zwei Ü"),
        (f"{parquet}:0", "one\n"),
        (f"{parquet}:1", "zwei Ü"),
    ]
    assert texts(source=str(tmp_path), field="body") == expected
    assert texts(source=str(tmp_path), kind="parquet", field="body") == expected[2:]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_field_is_named_with_those_there_are(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, '{"title": "t", "body": "b"}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"title": "t", "body": "b"}]), path)
    with pytest.raises(ValueError, match=r"rows\.\w+.*no field 'text'.*body, title|rows.*no field 'text'.*title, body"):
        texts(source=str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"rows\.jsonl:2: not a JSON object"),
        ("[1]", r"rows\.jsonl:2: holds list"),
        ('{"text": 3}', r"rows\.jsonl:2: field 'text' holds int, not text"),
        ('{"text": null}', r"rows\.jsonl:2: field 'text' holds NoneType"),
        (r'{"text": "a\u0000b"}', r"rows\.jsonl:2: field 'text' holds a NUL character at 1"),
        (r'{"text": "a\ud800b"}', r"rows\.jsonl:2: field 'text' holds a lone surrogate at character 1"),
    ],
)
def test_a_bad_row_is_refused_by_line(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", '{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts(source=str(path))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    path = write(tmp_path / "x.parquet", "plain text, no table")
    with pytest.raises(ValueError, match=r"x\.parquet: not a readable Parquet file"):
        texts(source=str(path))


def test_huggingface_streams_rows_of_a_local_builder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write(tmp_path / "rows.jsonl", '{"body": "eins"}\n{"body": "zwei"}\n')
    config = {"source": "json", "kind": "huggingface", "data_files": str(path), "field": "body"}
    assert texts(**config) == [("json/train:0", "eins"), ("json/train:1", "zwei")]
    with pytest.raises(
        ValueError, match=r"dataset 'json', split 'train' has no field 'text': set field to one of body"
    ):
        texts(**(config | {"field": "text"}))
    with pytest.raises(ValueError, match=r"split 'dev' cannot be read"):
        texts(**config, split="dev")
    before = Corpus(config).fingerprint()
    write(path, '{"body": "eins"}\n{"body": "drei, longer"}\n')
    assert Corpus(config).fingerprint() != before


def test_stdlib_is_source_code_on_every_machine():
    corpus = Corpus({"source": "stdlib"})
    names = [file.name for file in corpus.files]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert corpus.total_bytes > 3_000_000
    decoder = next(document for document in corpus.documents() if document.name == "json/decoder.py")
    assert "class JSONDecoder" in decoder.text
    assert all(len(document.text) >= 0 for document in corpus.documents())  # all of it is readable text


def test_what_does_not_exist_or_holds_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such file or folder.*stdlib"):
        Corpus({"source": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="no file matches this glob"):
        Corpus({"source": str(tmp_path / "*.txt")})
    with pytest.raises(ValueError, match="the folder holds no files"):
        Corpus({"source": str(tmp_path)})
    write(tmp_path / "a.txt", "x")
    with pytest.raises(ValueError, match="the folder holds no jsonl files"):
        Corpus({"source": str(tmp_path), "kind": "jsonl"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"source": "a", "kind": "pdf"}, "kind"),
        ({"source": "a", "feild": "x"}, "feild"),
        ({"source": "a", "split": "train"}, "split only has a meaning with kind: huggingface"),
        ({"source": ["a", "b"], "kind": "huggingface"}, "reads one dataset, 2 were given"),
        ({"source": "a", "kind": "stdlib"}, "kind stdlib reads the source `stdlib`"),
        ({"source": ["stdlib", "a"]}, "`stdlib` stands alone"),
    ],
)
def test_contradictory_configs_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        CorpusConfig.model_validate(config)
    with pytest.raises(ValueError, match=message) as caught:
        Corpus(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PNG!\x00\x89", "byte 4 is NUL, so this is a binary file"),
        (b"caf\xe9 au lait", "not UTF-8 text at byte 3"),
        (b"abc\xe2\x82", "not UTF-8 text at byte 3"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 2, 1000])
def test_binary_and_undecodable_files_are_refused_at_the_byte(tmp_path, content, message, piece_bytes):
    with pytest.raises(ValueError, match=f"some name: {message}"):
        list(read_text(io.BytesIO(content), "some name", piece_bytes))
    path = write(tmp_path / "file", content)
    with pytest.raises(ValueError, match=message):
        texts(source=str(path))


@pytest.mark.parametrize("piece_bytes", [1, 3, 5, 1000])
def test_text_in_pieces_is_the_text(piece_bytes):
    text = "a\r\nß€😀\ufeff é" * 7
    assert "".join(read_text(io.BytesIO(text.encode()), "t", piece_bytes)) == text


def test_a_text_file_can_be_read_again(tmp_path):
    file = TextFile(write(tmp_path / "a", "abc"))
    assert list(file) == list(file) == ["abc"]


def test_the_fingerprint_follows_content_and_request(tmp_path):
    path = write(tmp_path / "a.txt", "abc")
    first = Corpus({"source": str(path)}).fingerprint()
    assert Corpus({"source": str(path)}).fingerprint() == first
    assert Corpus({"source": str(path), "max_documents": 1}).fingerprint() != first
    write(path, "abcd")
    assert Corpus({"source": str(path)}).fingerprint() != first


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhi \xef\xbb\xbf!")
    assert texts(source=str(path))[0][1] == "hi \ufeff!"
    with path.open("rb") as stream:
        assert "".join(read_text(stream, "a", piece)) == "hi \ufeff!"
    path.write_bytes(b"\xef\xbb\xbf")
    assert texts(source=str(path))[0][1] == ""


def test_a_field_of_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tbody\nhi\tho\n")
    with pytest.raises(ValueError, match=r"field 'body' has no meaning for source .*plain text, such as .*a\.tsv"):
        Corpus({"source": str(tmp_path / "a.tsv"), "field": "body"})
    (tmp_path / "b.jsonl").write_text('{"body": "ho"}\n')
    both = texts(source=[str(tmp_path / "a.tsv"), str(tmp_path / "b.jsonl")], field="body")
    assert [text for _, text in both] == ["text\tbody\nhi\tho\n", "ho"]
