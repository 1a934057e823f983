"""Models of Transformers in our trainer: they run, resume, are measured and saved as their own class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_resume import assert_same, elsewhere, train
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megalodon.cli.evaluate import app as evaluate
from megalodon.data import load_tokenizer
from megalodon.training import launch
from megalodon.training.config_file import check_config
from megalodon.training.metrics import read_lines

MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
MAMBA2 |= {"chunk_size": 16}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)


def of(tiny: dict, kind: str, fields: dict, **data) -> dict:
    model = {"architecture": "transformers", "kind": kind, "fields": {**fields, "tie_word_embeddings": True}}
    return {
        **tiny,
        "model": model,
        "data": {**tiny["data"], **data},
        "run": {**tiny["run"], "steps": 8},
        "evaluation": {"every": 4, "max_tokens": 100},
        "sampling": {"every": 8, "max_new_tokens": 2},
    }


@pytest.mark.parametrize(("kind", "fields", "mode"), [("mamba2", MAMBA2, "streamed"), ("llama", LLAMA, "packed")])
def test_a_run_that_goes_on_ends_as_one_that_was_left_alone(tiny, tmp_path: Path, kind, fields, mode) -> None:
    values = of(tiny, kind, fields, mode=mode)
    whole = elsewhere(values, tmp_path, "whole")
    train(whole)
    other = elsewhere(values, tmp_path, "other")
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "step-000008")
    train(other)
    assert_same(tmp_path / "whole", tmp_path / "other")
    losses = [record["loss"] for record in read_lines(tmp_path / "whole" / "metrics.jsonl") if record.get("loss")]
    assert losses[-1] < losses[0] - 0.3


def test_the_folder_is_its_own_and_is_measured_alike(tiny, tmp_path: Path) -> None:
    train(of(tiny, "mamba2", MAMBA2, mode="streamed"))
    folder = tmp_path / "run" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "Mamba2ForCausalLM"
    text = tmp_path / "texts" / "0.txt"
    ids = torch.as_tensor(load_tokenizer(folder).encode(text.read_text()))[None]
    with torch.no_grad():
        expected = float(theirs(ids, labels=ids).loss)
    arguments = [str(tmp_path / "run"), str(text), "--piece-length", "300", "--output", str(tmp_path / "scores")]
    done = CliRunner().invoke(evaluate, ["perplexity", *arguments])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "scores" / "perplexity.json").read_text())["overall"]["loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    tuned = {**of(tiny, "mamba2", MAMBA2), "model": {"init_from": str(tmp_path / "run")}}
    assert check_config(tuned, "test").model.architecture == "transformers"
    train(elsewhere(tuned, tmp_path, "tuned", steps=4))
    first = next(record for record in read_lines(tmp_path / "tuned" / "metrics.jsonl") if record["step"] == 0)
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert first["heldout_loss"] == pytest.approx(last["heldout_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", LLAMA, "data.mode: the cache of LlamaForCausalLM grows by 512 bytes with each token"),
        (
            "mamba",
            {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
            "data.mode: MambaForCausalLM reads otherwise in pieces",
        ),
        ("llama", {"hiden_size": 32}, "model.fields: a llama config has no field 'hiden_size'; did you mean"),
        ("lamma", {}, "model.kind='lamma': .*did you mean"),
    ],
)
def test_what_cannot_be_is_refused_before_work(tiny, kind, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(of(tiny, kind, fields, mode="streamed"), "test")
