"""Passkey, induction and `megalodon explain`, on small trained-by-hand models and on folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megalodon import GeckoConfig, GeckoForCausalLM, KinConfig, KinForCausalLM, MegalodonConfig, MegalodonForCausalLM
from megalodon.cli import main
from megalodon.data import ByteTokenizer
from megalodon.evaluation.explain import explain, gradients_of
from megalodon.evaluation.induction import evaluate_induction
from megalodon.evaluation.passkey import evaluate_passkey
from megalodon.models import CausalLM


def small(vocabulary: int = 256) -> CausalLM:
    torch.manual_seed(2)
    config = MegalodonConfig(
        **{"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32},
        **{"vocab_size": vocabulary, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4, "eos_token_id": 0},
    )
    return MegalodonForCausalLM(config).eval()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main([*map(str, arguments)])
    return int(exit.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    return tmp_path / "model"


def test_pieces_change_nothing() -> None:
    model, tokenizer = small(), ByteTokenizer()
    options = {"lengths": [400], "depths": [0.3], "trials": 3}
    whole, cut = (evaluate_passkey(model, tokenizer, piece_length=n, **options)["results"][0] for n in (4096, 32))
    assert whole["nats"] == pytest.approx(cut["nats"], rel=1e-5)
    whole, cut = (evaluate_induction(model, 256, [200], 2, piece_length=n)["results"][0] for n in (4096, 16))
    assert np.isfinite(whole["loss_again"])
    # Pieces of another length draw other tokens; the same length of piece draws the same.
    assert cut == evaluate_induction(model, 256, [200], 2, piece_length=16)["results"][0]


def test_passkey_by_length_and_what_is_refused() -> None:
    model, tokenizer = small(), ByteTokenizer()
    report = evaluate_passkey(model, tokenizer, [300, 600], (0.0, 1.0), trials=4)
    assert [entry["length"] for entry in report["by_length"]] == [300, 600]
    assert all(0 <= entry["preferred"] <= 1 and entry["exact"] == 0 for entry in report["results"])
    for arguments, message in (
        ({"lengths": [50]}, "lengths"),
        ({"lengths": [300], "depths": (2.0,)}, "depths"),
        ({"lengths": [300], "trials": 1}, "trials"),
        ({"lengths": [300], "piece_length": 0}, "piece_length"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_passkey(model, tokenizer, **arguments)


def test_induction_of_a_model_that_learned_to_repeat() -> None:
    """Two layers that are trained for a moment on repeated rows gain in the second reading; at first they do not."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "model_dim": 32, "num_heads": 1, "vocab_size": 16, "ffn_hidden_dim": 0}
    model = KinForCausalLM(KinConfig(mixers=["base_conv", "attention"], **sizes)).eval()
    before = evaluate_induction(model, 16, [24], trials=32)["results"][0]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        ids = torch.randint(0, 16, (32, 12)).repeat(1, 2)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = evaluate_induction(model, 16, [24], trials=32)["results"][0]
    assert abs(before["gain"]) < 0.2 < 0.5 < after["gain"]
    assert after["accuracy"] > 0.4 > before["accuracy"]


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    filler = tmp_path / "filler.txt"
    filler.write_text("All work and no play. " * 40)
    arguments = ("evaluate", "passkey", folder, "--lengths", "512,1K", "--depths", "0.5", "--trials", 2)
    assert run(*arguments, "--filler", filler, "--output", output) == 0
    report = json.loads((output / "passkey.json").read_text())
    assert [entry["length"] for entry in report["results"]] == [512, 1024]
    assert run("evaluate", "induction", folder, "--lengths", 64, "--output", output) == 0
    assert json.loads((output / "induction.json").read_text())["drawn_from"] == 255
    assert run("evaluate", "induction", folder, "--lengths", "64,big") == 2
    assert "'big' is no number of tokens" in capsys.readouterr().err


def test_explain_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "explained"
    text = "The key is 12. The key is 1"
    assert run("explain", folder, text, "--output", output, "--token", 24) == 0
    report = json.loads((output / "explain.json").read_text())
    assert "".join(token["text"] for token in report["tokens"]) == text
    assert len(report["relevance"]) == report["target"] == 24
    assert sum(report["relevance"]) == pytest.approx(1)
    maps = np.load(output / "maps.npz")
    assert {entry["array"] for entry in report["maps"]} == set(maps.files)
    assert all(maps[name].shape == (24, 24) and not np.triu(maps[name], 1).any() for name in maps.files)
    assert max(entry["error"] for entry in report["maps"]) < 1e-5
    assert all(len(curve) == 10 for curve in report["perturbation"]["curves"].values())
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in ("maps.png", "relevance.png"))
    capsys.readouterr()
    for arguments, message in ((("--token", 0), "token"), (("--token", 99), "token")):
        assert run("explain", folder, text, "--output", tmp_path / "never", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_relevance_finds_what_an_answer_stands_on() -> None:
    """A model that repeats rows: removing what is relevant first hurts most, and last least."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "model_dim": 32, "num_heads": 1, "vocab_size": 16, "ffn_hidden_dim": 0}
    model = KinForCausalLM(KinConfig(mixers=["base_conv", {"name": "attention"}], **sizes))
    model.model.layers[0].mixer = (
        KinForCausalLM(KinConfig(mixers="mamba", mixer_parameters={"mamba": {"state_size": 2}}, **sizes))
        .model.layers[0]
        .mixer
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        ids = torch.stack([torch.randperm(16)[:10] for _ in range(32)]).repeat(1, 2)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    texts = [np.tile(np.random.RandomState(i).permutation(16)[:10], 2) for i in range(8)]
    found = [explain(model, text, 16) for text in texts]
    areas = {name: np.mean([each.areas()[name] for each in found]) for name in found[0].curves}
    assert areas["most_relevant_first"] < areas["random"] < areas["least_relevant_first"]
    with pytest.raises(ValueError, match="weights='some'"):
        explain(model, texts[0], 16, weights="some")


@pytest.mark.parametrize("name", ["megalodon", "gecko", "attention", "mamba", "mamba2", "gla"])
@torch.no_grad()
def test_gradients_are_what_entries_do_to_the_log_probability(name: str) -> None:
    """The derivative along a change of one path's outputs, against the model run with that change."""
    torch.manual_seed(3)
    sizes = {"num_layers": 2, "model_dim": 16, "vocab_size": 32}
    if name in ("megalodon", "gecko"):
        config, kind = (
            (MegalodonConfig, MegalodonForCausalLM) if name == "megalodon" else (GeckoConfig, GeckoForCausalLM)
        )
        rest = {"z_dim": 8, "value_dim": 16, "num_heads": 2, "ffn_hidden_dim": 16, "cema_ndim": 4, "norm_num_groups": 4}
        model = kind(config(**sizes, **rest, chunk_size=4)).double().eval()
    else:
        model = KinForCausalLM(KinConfig(mixers=name, num_heads=2, **sizes)).double().eval()
    ids, wanted = torch.randint(0, 32, (1, 11)), 5
    layers = model.model.implicit_attention(ids)
    for layer, paths in enumerate(layers):
        for number, path in enumerate(paths):
            gradient = gradients_of(model, ids, wanted, layers)[layer][number]
            change = torch.randn_like(path.outputs)
            (end,) = (one for one in model.modules() if getattr(one, "weight", None) is path.weight)

            def moved(by: float, end=end, change=change) -> float:
                with end.register_forward_pre_hook(lambda _, given: (given[0] + by * change.flatten(2),)):
                    hidden = model.model(ids).last_hidden_state[0, -1]  # float64, as the logits are not
                    return float((model.lm_head.weight @ hidden).log_softmax(-1)[wanted])

            along = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert float((gradient * change).sum()) == pytest.approx(along, rel=1e-5, abs=1e-7)
            assert gradient.abs().sum() > 0
            whole = (path.applied() if path.constant is None else path.applied() - path.constant) * gradient
            entries = path.matrix() * (gradient.flatten(2).mT[..., None] * path.values.flatten(2).mT[:, :, None])
            assert float(entries.sum()) == pytest.approx(float(whole.sum()), rel=1e-8)
            assert torch.allclose(path.mean_map(gradient), entries.clamp(min=0).mean(1), rtol=1e-10, atol=1e-18)
