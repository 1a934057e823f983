"""Gecko in the authors' checkpoint folders: there and back to the bit, told apart from Megalodon, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megalodon import GeckoConfig, GeckoForCausalLM, MegalodonConfig
from megalodon.cli import main
from megalodon.convert import read_checkpoint, read_pretrained, write_checkpoint
from megalodon.convert.folders import checkpoint_to_pretrained, pretrained_to_reference, reference_to_pretrained
from megalodon.inference.loading import load_model
from megalodon.models import Config, build_model


def small(kind: type[Config], **changes: object) -> Config:
    sizes = {"num_layers": 2, "model_dim": 16, "z_dim": 16, "value_dim": 32, "num_heads": 4, "ffn_hidden_dim": 12}
    rest = {"vocab_size": 11, "cema_ndim": 4, "chunk_size": 8, "norm_num_groups": 4, "swiglu": True}
    return kind(**{**sizes, **rest, **changes})


def write(folder: Path, config: Config, ranks: int = 1) -> dict[str, Tensor]:
    weights = {name: torch.randn_like(value) for name, value in build_model(config).named_parameters()}
    folder.mkdir()
    write_checkpoint(folder, config, weights, ranks)
    return weights


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["convert", "reference", *map(str, arguments)])
    return int(exit.value.code or 0)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"two_hop_residual": True, "num_rope_heads": 1, "layernorm_num_groups": 2}),
        (2, {"norm_beta1": 0.9, "norm_beta2": 0.95, "rescale_nffn": True}),
        (4, {"share_emb": True, "scale_emb": True, "rope_base": 1e4}),
        (1, {"output_size": 7, "swiglu": False, "norm_affine": False, "attention_dropout_mode": "dropkey"}),
    ],
)
def test_any_split_reads_back_to_the_bit(tmp_path: Path, ranks: int, changes: dict[str, object]) -> None:
    config = small(GeckoConfig, **changes)
    weights = write(tmp_path / "theirs", config, ranks)
    assert len(list((tmp_path / "theirs").glob("*.pth"))) == ranks
    read_config, read = read_checkpoint(tmp_path / "theirs")
    assert isinstance(read_config, GeckoConfig)
    assert {name: getattr(read_config, name) for name in changes} == changes
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], weights[name]) for name in read)


def test_a_checkpoint_of_the_authors_gives_their_logits(shared: Path, tmp_path: Path) -> None:
    """What their modules hold, in a folder: parameters of a golden file, buffers included."""
    with safe_open(shared / "golden" / "gecko" / "full_twohop_rope1.safetensors", "pt") as file:
        inner = json.loads(file.metadata()["meta"])["config"]
        theirs = {name[6:]: file.get_tensor(name) for name in file.keys() if name.startswith("param.")}  # noqa: SIM118
        tokens, expected = file.get_tensor("tokens"), file.get_tensor("logits")
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(theirs, folder / "consolidated.pth")
    (folder / "config.json").write_text(json.dumps({"model": inner, "tokenizer": {}}))
    (folder / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": 1, "dtype": "fp32"}))
    assert run(folder, tmp_path / "ours") == 0
    with torch.no_grad():
        logits = load_model(tmp_path / "ours")(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert run(tmp_path / "ours", tmp_path / "again", "--to-reference") == 0
    again = torch.load(tmp_path / "again" / "consolidated.pth", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in theirs.items())
    written = json.loads((tmp_path / "again" / "config.json").read_text())["model"]
    assert written == inner


def test_folders_name_the_class_that_opens_them(tmp_path: Path) -> None:
    weights = write(tmp_path / "theirs", small(GeckoConfig), 2)
    reference_to_pretrained(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == ["GeckoForCausalLM"]
    model = GeckoForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    pretrained_to_reference(tmp_path / "ours", tmp_path / "again", 2)
    for path in (tmp_path / "theirs").glob("*.pth"):
        expected, actual = (torch.load(p, weights_only=True) for p in (path, tmp_path / "again" / path.name))
        assert set(expected) == set(actual) and all(torch.equal(actual[name], expected[name]) for name in expected)
    assert isinstance(read_pretrained(tmp_path / "ours")[0], GeckoConfig)


@pytest.mark.parametrize(
    ("kind", "other", "field"),
    [(GeckoConfig, "megalodon", "layernorm_num_groups"), (MegalodonConfig, "gecko", "norm_num_groups")],
)
def test_the_other_architecture_is_refused_by_its_field(
    tmp_path: Path, kind: type[Config], other: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "theirs", small(kind))
    (tmp_path / "theirs" / "consolidated.pth").write_bytes(b"never read")
    with pytest.raises(ValueError, match=f"'{field}'.*looks like a {kind.model_type} config"):
        read_checkpoint(tmp_path / "theirs", other)
    assert run(tmp_path / "theirs", tmp_path / "ours", "--architecture", other) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and field in error
    assert not (tmp_path / "ours").exists()


def test_weights_of_the_other_architecture_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "gecko", small(GeckoConfig))
    write(tmp_path / "megalodon", small(MegalodonConfig))
    for one, other in (("gecko", "megalodon"), ("megalodon", "gecko")):
        weights = (tmp_path / other / "consolidated.pth").read_bytes()
        folder = tmp_path / f"{one}-config"
        folder.mkdir()
        for path in (tmp_path / one).glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "consolidated.pth").write_bytes(weights)
        with pytest.raises(ValueError, match=r"mega\."):
            read_checkpoint(folder)


def test_bad_configs_are_named_before_weights_are_read(tmp_path: Path) -> None:
    write(tmp_path / "theirs", small(GeckoConfig))
    path = tmp_path / "theirs" / "config.json"
    good = json.loads(path.read_text())
    (tmp_path / "theirs" / "consolidated.pth").write_bytes(b"never read")
    for change, message in (
        ({"timenorm_num_groups": 16}, "norm_num_groups=16.*smaller than model_dim"),
        ({"timenorm_beta1": 1.0}, "norm_beta1=1.0"),
        ({"num_rope_heads": 5}, "num_rope_heads=5"),
        ({"norm_num_groups": 4}, "norm_num_groups"),
        ({"omega": 1}, "omega"),
        ({"chunk_size": "8"}, "chunk_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_base": "wide"}, "rope_base"),
        ({"output_size": "wide"}, "output_size"),
        ({"efficient_attn": "flash"}, "efficient_attn"),
    ):
        path.write_text(json.dumps({**good, "model": {**good["model"], **change}}))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "theirs")


def test_a_prior_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "theirs", small(GeckoConfig))
    path = tmp_path / "theirs" / "consolidated.pth"
    weights = torch.load(path, weights_only=True)
    weights["layers.0.mega.timenorm.prior_count"] += 3
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"prior_count is 3.*Gecko"):
        read_checkpoint(tmp_path / "theirs")


def test_dropped_weights_have_no_name_there(tmp_path: Path) -> None:
    config = small(GeckoConfig, attention_dropout=0.1)
    weights = dict(build_model(config).named_parameters())
    with pytest.raises(ValueError, match=r"attention_dropout_mode='softmax'.*'dropkey'"):
        write_checkpoint(tmp_path, config, weights)
    assert not list(tmp_path.iterdir())


def test_sharded_checkpoints_of_a_gecko_run_become_a_folder(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as distributed_checkpoint

    config = small(GeckoConfig)
    weights = {name: value.detach() for name, value in build_model(config).named_parameters()}
    source = tmp_path / "step-00000001"
    config.save_pretrained(source / "model")
    distributed_checkpoint.save(
        {f"model/{name}": value for name, value in weights.items()}, checkpoint_id=source / "shards", no_dist=True
    )
    assert isinstance(checkpoint_to_pretrained(source, tmp_path / "whole"), GeckoConfig)
    model = load_model(tmp_path / "whole")
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
