"""Recall tasks against their authors' arrays, and a small study from config to table, ended and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megalodon.cli import main
from megalodon.evaluation.recall import (
    MQAR,
    NOT_ASKED,
    Induction,
    JointRecall,
    SelectiveCopying,
    load_study,
    read_results,
    run_cell,
    segment_seeds,
)
from megalodon.evaluation.recall import training as cell_training

CONFIGS = Path(__file__).parents[2] / "configs" / "recall"
STUDY = """
task: mqar
common: {vocab_size: 32, length: 16, filler: false}
train: [{pairs: 2, examples: 64}]
test: [{pairs: 2, examples: 16}, {pairs: 4, examples: 16}]
widths: [16]
shared: {num_layers: 2, num_heads: 1, ffn_hidden_dim: 0, share_emb: true, dropout: 0.1}
models:
  attention: {mixers: [base_conv, attention]}
  megalodon: {architecture: megalodon, z_dim: 8, value_dim: 16, chunk_size: 8, cema_ndim: 2, norm_num_groups: 4,
    ffn_hidden_dim: 16}
training: {batch_size: 16, epochs: 3, learning_rates: [3e-3, 1e-2]}
"""


def golden(shared: Path, file: str) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(shared / "golden" / "kin" / f"{file}.safetensors", "pt") as opened:
        return json.loads(opened.metadata()["meta"]), {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118


def test_mqar_is_the_authors(shared: Path) -> None:
    meta, tensors = golden(shared, "mqar")
    for case in ("paper64", "paper256", "filled", "flat"):
        given = meta["config"][case]
        sizes = {"length": given["input_seq_len"], "pairs": given["num_kv_pairs"], "examples": given["num_examples"]}
        segment = MQAR(
            vocab_size=given["vocab_size"],
            power=given.get("power_a", 0.01),
            filler=given["random_non_queries"],
            **sizes,
        )
        assert not segment.problems() and given["torch_seed"] == given["seed"] + 1
        made = segment.draw(given["seed"])
        assert torch.equal(made.inputs, tensors[f"{case}.inputs"].long())
        assert torch.equal(made.labels, tensors[f"{case}.labels"].long())
    seeds = meta["config"]["segment_seeds_for_seed_123"]
    assert segment_seeds(123, 5, 7) == (seeds["train5"], seeds["test7"])


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (128, 8), (256, 16)])
def test_mqar_statistics(shared: Path, length: int, pairs: int) -> None:
    expected = golden(shared, "mqar")[1][f"stat.{length}.{pairs}.gap_mean_by_pair"].numpy()
    made = MQAR(length=length, pairs=pairs, examples=2000, filler=False).draw(5)
    rows, places = (made.labels != NOT_ASKED).nonzero(as_tuple=True)
    asked = made.inputs[rows, places].reshape(2000, pairs)
    order = (
        (asked[:, :, None] == made.inputs[:, None, 0 : 2 * pairs : 2]).float().argmax(-1)
    )  # which pair each asks for
    gaps = np.zeros((2000, pairs))
    np.put_along_axis(gaps, order.numpy(), ((places.reshape(2000, pairs) - 2 * pairs) // 2).numpy(), 1)
    spread = gaps.std(0) / 2000**0.5
    assert (np.abs(gaps.mean(0) - expected) < 6 * spread).all()  # the golden's mean is of 4000 rows


def test_joint_recall_is_the_authors(shared: Path) -> None:
    meta, tensors = golden(shared, "joint_recall")
    for case, given in meta["config"].items():
        segment = JointRecall(
            contexts=given["n_context"],
            keys=given["n_key"],
            values=given["n_value"],
            max_contexts=given["max_n_context"],
            max_keys=given["max_n_key"],
            examples=given["examples"],
        )
        made = segment.draw(given["numpy_seed"])
        assert torch.equal(made.inputs, tensors[f"{case}.inputs"].long())
        assert torch.equal(made.labels != NOT_ASKED, tensors[f"{case}.mask"].bool())
        rows, places = (made.labels != NOT_ASKED).nonzero(as_tuple=True)
        assert torch.equal(made.labels[rows, places], made.inputs[rows, places + 1])


def test_induction_and_selective_copying() -> None:
    made = Induction(vocab_size=8, length=32, examples=50).draw(3)
    for row, labels in zip(made.inputs.tolist(), made.labels.tolist(), strict=True):
        assert row.count(8) == 2 and row[-1] == 8
        assert labels[:-1] == [NOT_ASKED] * 31 and labels[-1] == row[row.index(8) + 1] < 8
    made = SelectiveCopying(vocab_size=6, length=20, copied=5, examples=50).draw(3)
    for row, labels in zip(made.inputs.tolist(), made.labels.tolist(), strict=True):
        assert [token for token in row[:20] if token] == labels[20:] and row[20:] == [1] * 5
    assert torch.equal(made.inputs, SelectiveCopying(vocab_size=6, length=20, copied=5, examples=50).draw(3).inputs)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *map(str, arguments)])
    return int(exit.value.code or 0)


def test_study_from_config_to_table_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "small.yaml", tmp_path / "study"
    path.write_text(STUDY)
    assert run("recall", path, "--output", folder) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 runs" in printed and "length 16, pairs 4" in printed
    results = read_results(folder)
    assert {result["architecture"] for result in results.values()} == {"megalodon-kin", "megalodon"}
    assert all(result["steps"] == 12 and len(result["by_epoch"]) == 3 for result in results.values())
    assert (folder / "recall.png").read_bytes().startswith(b"\x89PNG") and not list((folder / "running").iterdir())
    # A result that was lost, and half a line: only that run is made again, and it is the same.
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    assert run("recall", path, "--output", folder) == 0
    assert "3 of 4 runs are there already" in capsys.readouterr().out
    for fingerprint, result in read_results(folder).items():
        for key in ("accuracy", "loss", "by_epoch", "state_bytes"):
            assert result[key] == results[fingerprint][key]


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY)
    study = load_study(path)
    cell = study.cells()[0]
    whole = run_cell(study, cell, tmp_path)
    calls, step = [], cell_training._step

    def ended(*arguments):
        calls.append(None)
        if len(calls) == 7:  # in the second epoch
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(cell_training, "_step", ended)
    with pytest.raises(KeyboardInterrupt):
        run_cell(study, cell, tmp_path)
    monkeypatch.setattr(cell_training, "_step", step)
    again = run_cell(study, cell, tmp_path)
    assert len(calls) == 7 and again["steps"] == whole["steps"] == 12
    assert (again["by_epoch"], again["loss"]) == (whole["by_epoch"], whole["loss"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_possible(path: Path) -> None:
    study = load_study(path)
    assert len({study.fingerprint(cell) for cell in study.cells()}) == len(study.cells())


def test_bad_studies_are_one_error_that_names_the_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    for old, new, message in (
        ("pairs: 4,", "pairs: 40,", "test.1.pairs: 40 need a length"),
        ("pairs: 4,", "pears: 4,", "did you mean pairs"),
        ("widths: [16]", "width: [16]", "did you mean widths"),
        ("[base_conv, attention]", "[base_conv, atention]", "models.attention, width 16"),
        ("architecture: megalodon,", "architecture: megaladon,", "models.megalodon, width 16"),
    ):
        path.write_text(STUDY.replace(old, new))
        assert run("recall", path, "--output", tmp_path / "never") == 2
        assert message in capsys.readouterr().err
    assert run("recall", tmp_path, "--output", tmp_path / "never") == 2
    assert "evaluate passkey" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
