"""`megalodon convert` on the sample checkpoints and on bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalodon.cli import main
from megalodon.data.tokenizer import ByteTokenizer
from megalodon.inference.loading import load_model, load_tokenizer_for


@pytest.mark.parametrize("name", ["checkpoint_mp1", "checkpoint_mp2"])
def test_sample_checkpoint_gives_its_logits(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "golden" / name
    with pytest.raises(SystemExit) as exit:
        main(["convert", "reference", str(source), str(tmp_path / "ours")])
    assert exit.value.code == 0
    expected = load_file(source / "expected.safetensors")
    with torch.no_grad():
        logits = load_model(tmp_path / "ours")(expected["tokens"]).logits
    assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()


def test_there_and_back_with_another_split(shared: Path, tmp_path: Path) -> None:
    for arguments in (
        [str(shared / "golden" / "checkpoint_mp2"), "ours"],
        ["ours", "four", "--to-reference", "--model-parallel-size", "4"],
        ["four", "again"],
    ):
        paths = [str(tmp_path / argument) if not argument.startswith("-") else argument for argument in arguments[:2]]
        with pytest.raises(SystemExit) as exit:
            main(["convert", "reference", *paths, *arguments[2:]])
        assert exit.value.code == 0
    first = load_file(tmp_path / "ours" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_tokenizer_too_large_for_the_checkpoint(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared / "golden" / "checkpoint_mp1"
    with pytest.raises(SystemExit) as exit:
        main(["convert", "reference", str(source), str(tmp_path / "ours"), "--tokenizer", "bytes"])
    assert exit.value.code == 2
    assert "vocab_size is 61" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["convert", "reference", str(tmp_path / "missing"), str(tmp_path / "out")])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing" in error


def test_model_parallel_size_needs_to_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "reference", "a", "b", "--model-parallel-size", "2"])
    assert "--to-reference" in capsys.readouterr().err


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    from megalodon import MegalodonConfig, MegalodonForCausalLM
    from megalodon.convert import write_checkpoint

    config = MegalodonConfig(
        **{"num_layers": 1, "model_dim": 16, "z_dim": 8, "value_dim": 16, "num_heads": 1, "ffn_hidden_dim": 16},
        **{"vocab_size": 256, "cema_ndim": 2, "chunk_size": 8, "norm_num_groups": 4},
    )
    (tmp_path / "theirs").mkdir()
    parameters = {name: value.detach() for name, value in MegalodonForCausalLM(config).named_parameters()}
    write_checkpoint(tmp_path / "theirs", config, parameters)
    with pytest.raises(SystemExit) as exit:
        main(["convert", "reference", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--tokenizer", "bytes"])
    assert exit.value.code == 0
    model = load_model(tmp_path / "ours")
    assert model.config.eos_token_id == 0
    assert isinstance(load_tokenizer_for(model, tmp_path / "ours"), ByteTokenizer)
