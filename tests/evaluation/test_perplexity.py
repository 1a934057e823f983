"""Perplexity: streamed piece by piece, it equals the loss of the whole sequence at once."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer, Document
from megalodon.evaluation import Progress, TokensFile, evaluate_perplexity, perplexity
from megalodon.evaluation.perplexity import overlapping_pieces

TEXT = "Everybody was at the ball; Natásha danced, and Prince Andrew looked on. " * 40


@pytest.fixture
def model() -> MegalodonForCausalLM:
    config = MegalodonConfig(
        **{"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32},
        **{"vocab_size": 256, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4},
    )
    return MegalodonForCausalLM(config).eval()


def document(text: str, name: str = "a", size: int = 1000) -> Document:
    return Document(name, [text[start : start + size] for start in range(0, len(text), size)])


def direct_losses(model: MegalodonForCausalLM, text: str) -> np.ndarray:
    """Nats of every byte but the first, from one forward pass in float64."""
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        hidden = MegalodonForCausalLM(model.config).double()
        hidden.load_state_dict(model.state_dict())
        logits = hidden.eval()(ids[:, :-1]).logits.double()
    return F.cross_entropy(logits[0], ids[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("piece_length", [37, 256, None])
def test_streamed_equals_whole(model: MegalodonForCausalLM, piece_length: int | None) -> None:
    report = evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)], piece_length)
    losses = direct_losses(model, TEXT)
    assert report["overall"]["tokens"] == report["overall"]["bytes"] == len(losses)
    assert report["overall"]["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert report["overall"]["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-6)
    assert report["overall"]["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    expected = [losses[:1023], losses[1023:2047], losses[2047:4095]]
    for bucket, part in zip(report["by_position"], expected, strict=True):
        assert bucket["tokens"] == len(part) and bucket["loss"] == pytest.approx(part.mean(), rel=1e-6)


def test_documents_are_alone_and_add_up(model: MegalodonForCausalLM) -> None:
    texts = [TEXT, "Short.", "x", "", TEXT[100:1700]]
    report = evaluate_perplexity(model, ByteTokenizer(), map(document, texts, "abcde"))
    for entry, text in zip(report["documents"], texts, strict=True):
        if len(text) < 2:
            assert entry["tokens"] == 0 and entry["loss"] is None and entry["by_position"] == []
        else:
            alone = evaluate_perplexity(model, ByteTokenizer(), [document(text)])["overall"]
            assert {key: entry[key] for key in alone if key != "documents"} == {
                key: value for key, value in alone.items() if key != "documents"
            }
    assert report["overall"]["documents"] == 5
    nats = sum(entry["loss"] * entry["tokens"] for entry in report["documents"] if entry["tokens"])
    assert report["overall"]["loss"] * report["overall"]["tokens"] == pytest.approx(nats)
    assert sum(bucket["tokens"] for bucket in report["by_position"]) == report["overall"]["tokens"]


def test_max_tokens_reads_only_the_beginning(model: MegalodonForCausalLM) -> None:
    def endless(text: str):
        yield text
        raise AssertionError("read beyond max_tokens")

    report = evaluate_perplexity(model, ByteTokenizer(), [Document("a", endless(TEXT))], max_tokens=500)
    assert report["overall"]["tokens"] == 499
    assert report["overall"]["loss"] == pytest.approx(direct_losses(model, TEXT)[:499].mean(), rel=1e-6)


def test_model_is_never_given_more_than_a_piece(model: MegalodonForCausalLM) -> None:
    lengths: list[int] = []
    model.model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    pieces = itertools.repeat(TEXT, 5)
    report = evaluate_perplexity(model, ByteTokenizer(), [Document("a", pieces)], piece_length=128)
    assert max(lengths) == 128 and sum(lengths) == report["overall"]["tokens"] == 5 * len(TEXT.encode()) - 1


def test_logits_in_slices_are_the_same(model: MegalodonForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)])
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 256 * 10)
    sliced = evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)])
    assert sliced["overall"]["loss"] == pytest.approx(whole["overall"]["loss"], rel=1e-6)


def test_progress_counts_up(model: MegalodonForCausalLM) -> None:
    seen: list[tuple[int, str, int]] = []

    def note(progress: Progress) -> None:
        seen.append((progress.documents, progress.name, progress.score.tokens))

    evaluate_perplexity(
        model, ByteTokenizer(), [document(TEXT[:600], "a"), document(TEXT[:300], "b")], 256, on_progress=note
    )
    first, second = len(TEXT[:600].encode()) - 1, len(TEXT[:300].encode()) - 1
    assert seen[0] == (1, "a", 256) and (1, "a", first) in seen and seen[-1] == (2, "b", first + second)


@given(lengths=st.lists(st.integers(0, 20), max_size=6), piece=st.integers(1, 12))
def test_pieces_overlap_by_one_and_lose_nothing(lengths: list[int], piece: int) -> None:
    ids = np.arange(sum(lengths))
    arrays = np.split(ids, np.cumsum(lengths)[:-1]) if lengths else []
    pieces = list(overlapping_pieces(arrays, piece))
    read = [token for part in pieces for token in part[:-1]]
    predicted = [token for part in pieces for token in part[1:]]
    assert read == list(ids[:-1]) and predicted == list(ids[1:])
    assert all(len(part) == piece + 1 for part in pieces[:-1]) and all(len(part) > 1 for part in pieces)


def test_bad_input_is_named(model: MegalodonForCausalLM) -> None:
    with pytest.raises(ValueError, match="none of the 2 documents"):
        evaluate_perplexity(model, ByteTokenizer(), [document(""), document("x")])
    with pytest.raises(ValueError, match="piece_length is 0"):
        evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)], piece_length=0)
    large = ByteTokenizer()
    large.vocab_size = 257
    with pytest.raises(ValueError, match="vocab_size is 256"):
        evaluate_perplexity(model, large, [document(TEXT)])
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(ValueError, match="token 1 of a is not finite"):
        evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)])


def test_by_place_in_the_chunk(model: MegalodonForCausalLM) -> None:
    report = evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)], 37)
    losses = direct_losses(model, TEXT)
    places = np.arange(len(losses)) % 16  # of the byte that predicts
    assert [(entry["from"], entry["to"]) for entry in report["by_chunk_place"]] == [(i, i + 1) for i in range(16)]
    for place, entry in enumerate(report["by_chunk_place"]):
        assert entry["tokens"] == (places == place).sum()
        assert entry["loss"] == pytest.approx(losses[places == place].mean(), rel=1e-5)
    assert report["by_distance"] is None


@pytest.mark.parametrize("piece_length", [7, 64, None])
def test_a_state_that_is_cut_remembers_nothing(model: MegalodonForCausalLM, piece_length: int | None) -> None:
    report = evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)], piece_length, reset_every=40)
    raw = TEXT.encode()
    ids = torch.tensor([list(raw)])
    whole = []
    with torch.no_grad():
        for start in range(0, len(raw) - 1, 40):
            piece = ids[:, start : start + 41]
            logits = model(piece[:, :-1]).logits[0].double()
            whole.append(F.cross_entropy(logits, piece[0, 1:], reduction="none").numpy())
    losses = np.concatenate(whole)
    assert report["overall"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    distances = np.arange(len(losses)) % 40
    assert [(entry["from"], entry["to"]) for entry in report["by_distance"]] == [(0, 16), (16, 32), (32, 40)]
    for entry in report["by_distance"]:
        own = (distances >= entry["from"]) & (distances < entry["to"])
        assert entry["tokens"] == own.sum() and entry["loss"] == pytest.approx(losses[own].mean(), rel=1e-5)
    with pytest.raises(ValueError, match="reset_every is 0"):
        evaluate_perplexity(model, ByteTokenizer(), [document(TEXT)], reset_every=0)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_file_has_every_token(model: MegalodonForCausalLM, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "out" / f"tokens{suffix}"
    documents = [document(TEXT[:300], "a"), document("x", "b"), document(TEXT[300:500], "c")]
    with TokensFile(path) as file:
        report = evaluate_perplexity(model, ByteTokenizer(), documents, 64, on_losses=file.add)
    table = pyarrow.parquet.read_table(path) if suffix == ".parquet" else pyarrow.csv.read_csv(path)
    rows = table.to_pydict()
    assert len(rows["loss"]) == report["overall"]["tokens"] and sum(rows["bytes"]) == report["overall"]["bytes"]
    assert sum(rows["loss"]) == pytest.approx(report["overall"]["loss"] * len(rows["loss"]), rel=1e-9)
    assert rows["document"] == [0] * rows["document"].count(0) + [2] * rows["document"].count(2)
    assert rows["position"][:3] == [1, 2, 3]
    assert bytes(rows["token"][:10]) == TEXT.encode()[1:11]
    with pytest.raises(ValueError, match=r"must end in \.parquet or \.csv"):
        TokensFile(tmp_path / "tokens.txt")
