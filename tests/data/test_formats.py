"""Formats by suffix, compressed or not; links; what a folder holds beside text; saved datasets, slices, bad rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megalodon.data import Corpus
from megalodon.data.formats import is_about_the_corpus, kind_of
from megalodon.data.slices import split_parts

ROWS = [{"text": 'one, "two"\r\nthree\n', "n": 1}, {"text": "zwei Ü😀", "n": 2}, {"text": "", "n": 3}]
TEXTS = [row["text"] for row in ROWS]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def texts(**config) -> list[str]:
    return [document.text for document in Corpus(config).documents()]


def written(folder: Path, kind: str) -> bytes:
    table = pyarrow.Table.from_pylist(ROWS)
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if kind == "array":
        return json.dumps(ROWS, indent=1).encode()
    if kind == "csv":
        return b'text,n\r\n"one, ""two""\r\nthree\n",1\r\n' + "zwei Ü😀,2\r\n,3\r\n".encode()
    path = folder / "made"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if kind == "arrow-stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rows.jsonl", "jsonl"),
        ("rows.ndjson", "jsonl"),
        ("rows.json", "jsonl"),
        ("rows.JSON", "array"),
        ("rows.csv", "csv"),
        ("rows.parquet", "parquet"),
        ("rows.arrow", "arrow-stream"),
        ("rows.arrow", "arrow-file"),
    ],
)
def test_every_format_in_every_compression_gives_the_same_texts(tmp_path, name, kind, compression):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](written(tmp_path, kind)))
    assert texts(source=str(path)) == TEXTS
    assert texts(source=str(tmp_path)) == TEXTS
    with pytest.raises(ValueError, match=r"rows.*no field 'body': set field to one of (n, text|text, n)"):
        texts(source=str(path), field="body")


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_compressed_text(tmp_path, suffix, compression):
    (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESS[compression](b"caf\xc3\xa9\r\n" * 1000))
    assert texts(source=str(tmp_path)) == ["café\r\n" * 1000]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_damaged_compressed_file_is_one_line(tmp_path, compression, damage, name):
    rows = [{"text": os.urandom(50).hex()} for _ in range(100)]
    content = "".join(json.dumps(row) + "\n" for row in rows) if "jsonl" in name else "text\n" + rows[0]["text"] * 100
    content = content.encode()
    whole = COMPRESS[compression](content)
    path = tmp_path / (name + compression)
    path.write_bytes({"cut": whole[: len(whole) // 2], "other": content, "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{path.name}: not a whole {compression} file") as caught:
        texts(source=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_what_follows_a_compressed_stream_is_not_passed_over(tmp_path, compression):
    """As where one of several parts in a file is damaged: the library would read the text up to there."""
    whole, path = COMPRESS[compression](b"one\n" * 9), tmp_path / f"a.txt{compression}"
    for damage in (b"garbage", whole[: len(whole) // 2], b"\1" + whole):
        path.write_bytes(whole + damage)
        with pytest.raises(ValueError, match=rf"{path.name}: not a whole {compression} file"):
            texts(source=str(path))
    if compression != ".zst":  # some tapes and archives fill their last block with zeros
        path.write_bytes(whole + b"\0" * 512)
        assert texts(source=str(path)) == ["one\n" * 9]


def test_what_is_no_regular_file_is_left_out_or_refused(tmp_path):
    (tmp_path / "a.txt").write_text("A")
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for a writer for ever
    corpus = Corpus({"source": str(tmp_path)})
    assert [file.path.name for file in corpus.files] == ["a.txt"]
    assert "pipe.txt (no file, but a pipe or the like)" in corpus.found.told()
    for name in (str(tmp_path / "pipe.txt"), os.devnull):
        with pytest.raises(ValueError, match="is a pipe or a device: it is read more than once, so give a file"):
            Corpus({"source": name})


def test_two_fields_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    table = pyarrow.Table.from_arrays([pyarrow.array(["one"]), pyarrow.array(["two"])], ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as sink:
        sink.write_table(table)
    for name in ("a.csv", "b.parquet", "c.arrow"):
        with pytest.raises(ValueError, match=rf"{name}: 2 fields are called 'text': rename"):
            texts(source=str(tmp_path / name))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damage_inside_a_table_is_one_line_with_its_name(tmp_path, kind):
    table, path = pyarrow.table({"text": ["abc" * 50] * 100}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, use_dictionary=False)
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table)
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=rf"a\.{kind}: not a readable \w+ file \(") as caught:
        texts(source=str(path))
    assert "\n" not in str(caught.value)


def test_several_compressed_parts_in_one_file_are_read_whole(tmp_path):
    for suffix, compress in list(COMPRESS.items())[1:]:
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one ") + compress(b"two"))
        assert texts(source=str(path)) == ["one two"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b\\"]},"}]',
        ' \n[\n{"text":"a"}\n,\n{"text":"b\\"]},"}\n]\n',
        '{"text": "a"}\n{"text": "b\\"]},"}\n',
        '{\n "text": "a"\n}\n{\n "text": "b\\"]},"\n}\n',
        '\ufeff[{"text": "a"}, {"text": "b\\"]},"}]',
        '\ufeff{"text": "a"}\n\n{"text": "b\\"]},"}',
    ],
)
def test_json_as_an_array_or_as_objects(tmp_path, content, monkeypatch):
    monkeypatch.setattr("megalodon.data.rows.BLOCK", 3)
    (tmp_path / "a.json").write_text(content)
    assert texts(source=str(tmp_path)) == ["a", 'b"]},']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', "the array is not closed"),
        ('[{"text": "a"} {"text": "b"}]', "no comma after row 0"),
        ('[{"text": "a"}, {"te', "in row 1"),
        ('[{"text": "a"}, 7]', "holds int, not a JSON object"),
        ('[{"text": "a"}] [{"text": "b"}]', r"something follows the array of 1 rows, '\['"),
        ('[{"text": "a"}] x', "something follows the array of 1 rows, 'x'"),
        ('[{"text": "a", "n": ' + "9" * 5000 + "}]", "in row 0"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "in row 0"),
        ('{"data": [{"text": "a"}]}', r"no field 'text': set field to one of data"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        texts(source=str(tmp_path))


def test_a_large_array_and_a_long_field_are_read(tmp_path):
    rows = [{"text": "x" * 300_000}, *({"text": str(i)} for i in range(20_000)), {"text": "é" * 300_000}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert texts(source=str(tmp_path)) == [row["text"] for row in rows]
    (tmp_path / "a.json").unlink()
    (tmp_path / "b.csv").write_text("\ufefftext\n" + "x" * 300_000 + "\n\ny\n")
    assert texts(source=str(tmp_path)) == ["x" * 300_000, "y"]


def test_nested_fields(tmp_path):
    rows = [{"meta": {"text": "a", "id": 1}, "n": 1}, {"meta": {"text": "b", "id": 2}, "n": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as sink:
        sink.write_table(table)
    assert texts(source=str(tmp_path), field="meta.text") == ["a", "b"] * 3
    for name in ("a.jsonl", "b.parquet", "c.arrow"):
        with pytest.raises(ValueError, match=r"no field 'meta\.body': set field to one of meta\.(text, meta\.)?id"):
            texts(source=str(tmp_path / name), field="meta.body")
    dotted = [{"meta.text": "dotted", "meta": {"text": "nested"}}]
    (tmp_path / "a.jsonl").write_text(json.dumps(dotted[0]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"meta.text": "dotted"}]), tmp_path / "b.parquet")
    assert texts(source=str(tmp_path / "a.jsonl"), field="meta.text") == ["dotted"]
    assert texts(source=str(tmp_path / "b.parquet"), field="meta.text") == ["dotted"]


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    corpus.mkdir()
    (elsewhere / "deep" / "a.txt").write_text("A")
    (corpus / "b.txt").write_text("B")
    (corpus / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(corpus)
    (corpus / "same.txt").symlink_to(corpus / "b.txt")
    os.link(corpus / "b.txt", corpus / "same-too.txt")
    (corpus / "linked-file.txt").symlink_to(elsewhere / "deep" / "a.txt")
    assert texts(source=str(corpus)) == ["B", "A"]
    names = [str(corpus / "b.txt"), str(corpus / "." / "b.txt"), os.path.relpath(corpus / "b.txt"), str(corpus)]
    assert texts(source=names) == ["B", "A"]
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: a link to nothing, .*nowhere\.txt"):
        texts(source=str(corpus))
    with pytest.raises(FileNotFoundError, match="a link to nothing"):
        texts(source=str(corpus / "gone.txt"))


def test_what_is_no_text_of_the_corpus_is_named_and_left_out(tmp_path):
    for name in ("README.md", "readme.txt", "LICENSE", "dataset_info.json", "state.json", "picture.png", "data.bin"):
        (tmp_path / name).write_text('{"text": "not the corpus"}')
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "readers.md").write_text("R")
    (tmp_path / "state.json").unlink()
    corpus = Corpus({"source": str(tmp_path)})
    assert [document.text for document in corpus.documents()] == ["A", "R"]
    told = corpus.found.told()
    for part in ("README.md (about the corpus)", ".git (hidden)", "2 more"):
        assert part in told
    reasons = {Path(name).name: reason for name, reason in corpus.found.left_out}
    assert reasons["picture.png"] == reasons["data.bin"] == "no known format"
    assert texts(source=str(tmp_path / "README.md")) == ['{"text": "not the corpus"}']
    assert texts(source=str(tmp_path / "*.md")) == ["R"]
    assert texts(source=str(tmp_path / "*")) == ["A", "R"]
    assert texts(source=str(tmp_path / "*.bin")) == ['{"text": "not the corpus"}']
    assert Corpus({"source": str(tmp_path / "a.txt")}).found.told() is None
    for name in ("a.txt", "readers.md"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"no files of a known format \(\.txt .*; there are .*LICENSE"):
        Corpus({"source": str(tmp_path)})


def test_a_folder_of_code_is_text_where_the_kind_says_so(tmp_path):
    (tmp_path / "a.py").write_text("import os")
    (tmp_path / "README.md").write_text("about")
    assert texts(source=str(tmp_path), kind="text") == ["import os"]
    with pytest.raises(ValueError, match="no files of a known format"):
        texts(source=str(tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("a.TXT.GZ", "text"), ("a.b.jsonl", "jsonl"), ("gz", None), ("a.py", None)])
def test_kinds_by_name(name, kind):
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize("name", ["readme", "README_de.md", "License-MIT.txt", "SHA256SUMS", "dataset_infos.json"])
def test_names_about_a_corpus(name):
    assert is_about_the_corpus(Path(name)) and not is_about_the_corpus(Path("x" + name))


# --- datasets -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    def made(name: str, size: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(size)]})

    both = datasets.DatasetDict({"train": made("train", 25), "test": made("test", 4)})
    both.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3, "test": 1})
    (tmp_path / "saved" / "train" / "cache-1234.arrow").write_bytes(b"what map left behind")
    return tmp_path / "saved"


SLICES = [
    ("train", [f"train {i}" for i in range(25)]),
    ("test", [f"test {i}" for i in range(4)]),
    ("train[:3]", ["train 0", "train 1", "train 2"]),
    ("train[8:10]+test[-1:]", ["train 8", "train 9", "test 3"]),
    ("train[:10%]", ["train 0", "train 1"]),
    ("train[90%:]+test[50%:75%]", ["train 22", "train 23", "train 24", "test 2"]),
    ("train[-2:]", ["train 23", "train 24"]),
]


@pytest.mark.parametrize(("split", "expected"), SLICES)
@pytest.mark.parametrize("kind", ["auto", "huggingface"])
def test_saved_datasets_and_slices(saved, kind, split, expected):
    assert texts(source=str(saved), kind=kind, split=split) == expected


@pytest.mark.parametrize(("split", "expected"), SLICES)
def test_slices_of_a_local_builder(tmp_path, monkeypatch, split, expected):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "built"
    folder.mkdir()
    for name, size in (("train", 25), ("test", 4)):
        rows = ({"text": f"{name} {i}"} for i in range(size))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(source=str(folder), kind="huggingface", split=split) == expected


def test_slices_round_as_the_datasets_library_does(tmp_path):
    saved = datasets.Dataset.from_dict({"text": [str(i) for i in range(37)]})
    saved.save_to_disk(str(tmp_path / "one"))
    for first, stop in ((0, 10), (10, 33), (33, 100), (50, 51)):
        spec = f"[{first}%:{stop}%]"
        instruction = datasets.ReadInstruction.from_spec("train" + spec).to_absolute({"train": 37})[0]
        assert split_parts("train" + spec)[0].rows(37) == (instruction.from_, instruction.to)
    assert texts(source=str(tmp_path / "one")) == [str(i) for i in range(37)]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", "has no split 'dev': set split to one of train, test"),
        ("train[30:40]", "there is no such slice of 25 rows"),
        ("train[5:5]", "there is no such slice"),
        ("train[a:b]", "write a name, a slice such as"),
        ("train[:200%]", "200% is more than all"),
    ],
)
def test_splits_that_are_not_there(saved, split, message):
    with pytest.raises(ValueError, match=message):
        texts(source=str(saved), split=split)


def test_a_saved_dataset_that_is_not_whole_is_refused(saved):
    (saved / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00003\.arrow is missing"):
        texts(source=str(saved))


def test_a_folder_with_a_state_of_its_own_is_no_saved_dataset(tmp_path):
    for content in ('{"step": 3}', "[1]", "not JSON"):
        (tmp_path / "state.json").write_text(content)
        (tmp_path / "a.txt").write_text("A")
        assert texts(source=str(tmp_path)) == ["A"]


def test_saved_splits_inside_a_folder_are_read_without_what_is_beside_them(saved):
    (saved / "dataset_dict.json").unlink()
    assert sorted(texts(source=str(saved))) == sorted(
        [f"train {i}" for i in range(25)] + [f"test {i}" for i in range(4)]
    )


# --- bad rows -----------------------------------------------------------------------------------------------

BAD = [
    "{broken",
    "[1]",
    '{"text": 3}',
    '{"text": null}',
    '{"body": "x"}',
    r'{"text": "a\u0000b"}',
    r'{"text": "\ud800"}',
]


def test_bad_rows_are_left_out_counted_and_named(tmp_path):
    lines = ['{"text": "good"}', *BAD, '{"text": "better"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text("\n".join(lines))
    (tmp_path / "c.csv").write_bytes(b'text,n\ngood,1\nx\n"a"b,2\n\xff,3\nbetter,4\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "good"}, {"text": None}]), tmp_path / "d.parquet")
    corpus = Corpus({"source": str(tmp_path), "bad_rows": "skip"})
    for _ in range(2):  # each reading counts anew
        assert [document.text for document in corpus.documents()] == ["good", "better"] * 3 + ["good"]
        assert corpus.bad_rows.count == 2 * len(BAD) + 3 + 1
    told = corpus.bad_rows.told()
    assert f"left out {2 * len(BAD) + 4} bad rows: {tmp_path / 'a.jsonl'}:2: not a JSON object" in told
    assert told.endswith(f"and {2 * len(BAD) + 1} more")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a JSON object"):
        texts(source=str(tmp_path))


def test_a_quote_that_nothing_closes_is_no_single_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text('text\ngood\n"bad\n' + "lost\n" * 100)
    with pytest.raises(ValueError, match=r"a\.csv:3: not CSV \(unexpected end of data\)"):
        texts(source=str(tmp_path), bad_rows="skip")


def test_a_field_that_no_row_has_is_refused_whatever_is_skipped(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no field 'text': set field to one of body"):
        texts(source=str(tmp_path), bad_rows="skip")


def test_a_message_lists_no_more_than_a_line_holds(tmp_path):
    (tmp_path / "a.csv").write_text("x" * 5000 + "," + ",".join(f"c{i}" for i in range(99)) + "\n")
    (tmp_path / "b.csv").write_text('"two\nlines",n\n')
    for name in ("a.csv", "b.csv"):
        with pytest.raises(ValueError, match="no field 'text': set field to one of") as caught:
            texts(source=str(tmp_path / name))
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
