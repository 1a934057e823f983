"""The reference's checkpoint folders: merged, cut again to the same bits, and refused when something is amiss."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.convert import read_checkpoint, read_pretrained, write_checkpoint, write_pretrained
from megalodon.convert.folders import pretrained_to_reference, reference_to_pretrained


def small_config(**changes: object) -> MegalodonConfig:
    sizes = {"num_layers": 2, "model_dim": 16, "z_dim": 16, "value_dim": 32, "num_heads": 4, "ffn_hidden_dim": 12}
    rest = {"vocab_size": 11, "cema_ndim": 4, "chunk_size": 8, "norm_num_groups": 4, "swiglu": True}
    return MegalodonConfig(**{**sizes, **rest, **changes})


def random_state_dict(config: MegalodonConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = MegalodonForCausalLM(config)
    return {name: torch.randn_like(value, dtype=dtype) for name, value in model.named_parameters()}


def write(folder: Path, ranks: int = 1, **changes: object) -> tuple[Path, dict[str, Tensor]]:
    config = small_config(**changes)
    state_dict = random_state_dict(config)
    folder.mkdir()
    write_checkpoint(folder, config, state_dict, ranks)
    return folder, state_dict


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["checkpoint_mp1", "checkpoint_mp2"])
def test_golden_folders_round_trip_to_the_bit(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "golden" / name
    reference_to_pretrained(source, tmp_path / "ours")
    ranks = len(list(source.glob("*.pth")))
    pretrained_to_reference(tmp_path / "ours", tmp_path / "theirs", ranks)
    for path in (*source.glob("*.pth"), *source.glob("*config.json")):
        written = tmp_path / "theirs" / path.name
        if path.suffix == ".json":
            assert json.loads(written.read_text()) == json.loads(path.read_text())
            continue
        expected = torch.load(path, weights_only=True)
        actual = torch.load(written, weights_only=True)
        assert set(actual) == set(expected)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (4, {"rescale_nffn": True}),
        (2, {"norm_prior_count": 3}),
        (2, {"share_emb": True, "rope_base": 1e5}),
        (1, {"output_size": 7, "attention_dropout_mode": "dropkey"}),
    ],
)
def test_any_split_reads_back_to_the_bit(tmp_path: Path, ranks: int, changes: dict[str, object]) -> None:
    folder, state_dict = write(tmp_path / "theirs", ranks, **changes)
    assert len(list(folder.glob("*.pth"))) == ranks
    config, read = read_checkpoint(folder)
    assert {name: value for name, value in config.to_dict().items() if name in changes} == changes
    assert set(read) == set(state_dict)
    assert all(torch.equal(read[name], state_dict[name]) for name in read)


def test_rank_files_hold_their_share_alone(tmp_path: Path) -> None:
    four, _ = write(tmp_path / "four", 4)
    rank = torch.load(four / "consolidated.03.pth", weights_only=True)
    assert rank["embed.weight"].shape == (11, 4) and rank["layers.0.mega.rmsnorm.weight"].shape == (16,)
    assert rank["layers.0.mega.wh2.weight"].shape == (16, 8) and rank["layers.0.nffn.fc1.weight"].shape == (3, 16)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in rank.values())


def test_dtypes_are_kept_or_chosen(tmp_path: Path) -> None:
    config = small_config()
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        write_checkpoint(folder, config, random_state_dict(config, dtype))
    reference_to_pretrained(tmp_path / "torch.bfloat16", tmp_path / "ours")
    ours, state_dict = read_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.bfloat16
    assert {value.dtype for value in state_dict.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="float16"):
        reference_to_pretrained(tmp_path / "torch.float16", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    reference_to_pretrained(tmp_path / "torch.float16", tmp_path / "half", torch.float32)
    assert read_pretrained(tmp_path / "half")[0].dtype == torch.float32


def test_mixed_dtypes_need_a_choice(tmp_path: Path) -> None:
    model = MegalodonForCausalLM(small_config()).bfloat16()
    model.lm_head.float()
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="bfloat16, float32"):
        pretrained_to_reference(tmp_path / "ours", tmp_path / "theirs")
    pretrained_to_reference(tmp_path / "ours", tmp_path / "theirs", dtype=torch.float32)
    assert json.loads((tmp_path / "theirs" / "consolidate_config.json").read_text())["dtype"] == "fp32"


def test_unset_vocabulary_is_read_from_the_weights(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "theirs")
    edit_config(folder, vocab_size=-1)
    assert read_checkpoint(folder)[0].vocab_size == 11


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")
    folder, _ = write(tmp_path / "theirs", 2)
    rank = folder / "consolidated.01.pth"
    whole = rank.read_bytes()
    rank.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth is damaged"):
        read_checkpoint(folder)
    flipped = bytearray(whole)
    weight = torch.load(io.BytesIO(whole), weights_only=True)["embed.weight"]
    flipped[whole.index(weight.numpy().tobytes())] ^= 1
    rank.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth is damaged: the checksum"):
        read_checkpoint(folder)
    rank.unlink()
    with pytest.raises(FileNotFoundError, match=r"consolidated\.01\.pth.*model_parallel_size 2"):
        read_checkpoint(folder)
    (folder / "consolidate_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="consolidate_config"):
        read_checkpoint(folder)


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploited"),))


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = write(tmp_path / "theirs")
    torch.save({"embed.weight": Exploit()}, folder / "consolidated.pth", pickle_module=pickle)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_checkpoint(folder)
    assert not (tmp_path / "exploited").exists()


def test_contradictions_are_named(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "theirs", 2)
    path = folder / "consolidated.01.pth"
    good = torch.load(path, weights_only=True)

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(folder)

    refused({**good, "layers.0.mega.rmsnorm.weight": torch.ones(16)}, "rmsnorm.weight should be the same")
    refused({**good, "embed.weight": torch.ones(11, 3)}, r"embed.weight has shape \[11, 3\] on rank 1")
    refused({name: value for name, value in good.items() if "wv" not in name}, "ranks 0 and 1")
    torch.save(good, path)
    edit_config(folder, num_layers=3)
    with pytest.raises(ValueError, match=r"lack \d+ parameters.*layers\.2"):
        read_checkpoint(folder)
    edit_config(folder, num_layers=1)
    with pytest.raises(ValueError, match=r"layers\.1"):
        read_checkpoint(folder)


@pytest.mark.parametrize(("ranks", "field"), [(8, "num_heads"), (0, "model_parallel_size")])
def test_sizes_that_do_not_divide(tmp_path: Path, ranks: int, field: str) -> None:
    config = small_config()
    with pytest.raises(ValueError, match=field):
        write_checkpoint(tmp_path, config, random_state_dict(config), ranks)
    assert not list(tmp_path.iterdir())


def test_target_is_not_overwritten(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    with pytest.raises(FileExistsError, match="ours"):
        reference_to_pretrained(folder, tmp_path / "ours")


def test_pretrained_folders_are_checked(tmp_path: Path) -> None:
    config = small_config()
    write_pretrained(tmp_path, config, random_state_dict(config))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged"):
        read_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llama"):
        read_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_pretrained(tmp_path)
