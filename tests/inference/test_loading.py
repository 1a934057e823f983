"""Loading a model: from its folder or a run's, with every weight checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer
from megalodon.inference import choose_device, load_model, load_tokenizer_for
from megalodon.inference.loading import torch_dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = MegalodonConfig(
        **{"num_layers": 1, "model_dim": 16, "z_dim": 8, "value_dim": 16, "num_heads": 1, "ffn_hidden_dim": 16},
        **{"vocab_size": 256, "cema_ndim": 2, "chunk_size": 8, "norm_num_groups": 4},
    )
    MegalodonForCausalLM(config).save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def test_a_model_and_the_run_it_belongs_to(folder: Path) -> None:
    ByteTokenizer().save(folder)
    direct, through_run = load_model(folder), load_model(folder.parent)
    assert not direct.training
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), through_run.parameters(), strict=True))
    assert isinstance(load_tokenizer_for(direct, folder.parent), ByteTokenizer)


def test_dtype_is_that_of_the_weights_or_chosen(folder: Path) -> None:
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="float16"):
        load_model(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        torch_dtype("float16")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "damaged"])
def test_weights_that_do_not_fit_are_refused(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.attention.o_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.layers.7.attention.o_proj.weight"] = torch.zeros(1)
    elif change == "shape":
        weights[name] = torch.zeros(3, 3)
    save_file(weights, path, {"format": "pt"})
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=str(folder)):
        load_model(folder)


def test_config_that_is_not_possible(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_num_groups": 5}))
    with pytest.raises(ValueError, match="norm_num_groups"):
        load_model(folder)


def test_missing_folders_and_tokenizers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        load_tokenizer_for(load_model(folder), folder)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("abacus", "cuda:77"):
        with pytest.raises(ValueError, match=name):
            choose_device(name)
