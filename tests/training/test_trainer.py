"""A run: what its folder holds, how it stops when asked, when the loss is not finite, and when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalodon.files import load_tensors
from megalodon.training import DivergedError, contents, heldout, launch, metrics, start, trainer
from megalodon.training.checkpoint import find_damage, list_checkpoints
from megalodon.training.config_file import check_config, load_config
from megalodon.training.metrics import read_lines
from megalodon.training.progress import LineDisplay
from megalodon.training.step import train_step


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)


def train(values):
    return start.train(launch.resolve(check_config(values, "test"), "test"), LineDisplay(values["run"]["steps"]))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def signal_at(monkeypatch, step, number):
    """Send this process a signal in the middle of a step (1 is the first)."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", interrupted)


def test_the_folder_of_a_run(tiny, tmp_path, capsys):
    assert not train(tiny)
    run = tmp_path / "run"
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "tensorboard", "checkpoints", "model"} <= set(
        names(run)
    )
    assert names(run / "checkpoints") == ["step-000004", "step-000008", "step-000012"]
    assert not [path for path in run.rglob("*") if "partial" in path.name]
    records = read_lines(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(13))
    assert [record["step"] for record in records if "heldout_bits_per_byte" in record] == [0, 4, 8, 12]
    assert records[12]["heldout_loss"] < records[0]["heldout_loss"] - 1
    assert records[1]["learning_rate"] == pytest.approx(3e-7)
    assert records[12]["tokens"] == 12 * 4 * 24
    assert [record["step"] for record in read_lines(run / "samples.jsonl")] == [6, 12]
    config = load_config(run / "config.yaml")
    assert (config.model.vocab_size, config.tokenizer) == (256, "bytes")
    assert "held-out loss" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer("whale").input_ids == list(b"whale")
    last = load_tensors(run / "checkpoints" / "step-000012" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())
    assert model.config.eos_token_id == 0


def test_nothing_in_a_checkpoint_is_a_pickle(tiny, tmp_path):
    train(tiny)
    suffixes = {path.suffix for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml", ".py", ".md"}  # a loader for others, and a model card


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tiny, tmp_path, monkeypatch, number):
    signal_at(monkeypatch, 6, number)
    stop = train(tiny)
    assert stop.signal == number
    run = tmp_path / "run"
    assert names(run / "checkpoints") == ["step-000004", "step-000006"]
    assert [record["step"] for record in read_lines(run / "metrics.jsonl")] == list(range(7))
    assert not (run / "model").exists()
    monkeypatch.setattr(trainer, "train_step", train_step)
    assert not train(tiny)
    assert [record["step"] for record in read_lines(run / "metrics.jsonl")] == list(range(13))


def test_a_signal_in_an_evaluation_leaves_it_to_the_next_process(tiny, tmp_path, monkeypatch):
    reference = {**tiny, "run": {**tiny["run"], "folder": str(tmp_path / "whole")}}
    train(reference)
    forward = heldout.forward_loss
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 25:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    monkeypatch.setattr(heldout, "forward_loss", interrupted)
    assert train(tiny).signal == signal.SIGTERM
    run = tmp_path / "run"
    stopped_at = max(int(name[-6:]) for name in names(run / "checkpoints"))
    assert stopped_at == 4
    assert [record["step"] for record in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    train(tiny)

    def losses(folder):
        keys = ("step", "loss", "heldout_loss")
        return [{key: record.get(key) for key in keys} for record in read_lines(folder / "metrics.jsonl")]

    assert losses(run) == losses(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_without_saving(tiny, tmp_path, monkeypatch):
    calls = []

    def poisoned(model, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
        return train_step(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(DivergedError) as caught:
        train(tiny)
    message = str(caught.value)
    assert "stopped at step 6: loss nan" in message
    assert str(tmp_path / "run" / "checkpoints" / "step-000004") in message
    assert message.count(".txt from token ") == 4
    assert names(tmp_path / "run" / "checkpoints") == ["step-000004"]
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(6))


def test_a_full_disk_leaves_the_run_consistent(tiny, tmp_path, monkeypatch):
    save_tensors = contents.save_tensors

    def full(path, *args):
        if "step-000008" in str(path) and path.name == "random.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_tensors(path, *args)

    monkeypatch.setattr(contents, "save_tensors", full)
    with pytest.raises(OSError, match="cannot save checkpoint step-000008: No space left") as caught:
        train(tiny)
    assert caught.value.errno == errno.ENOSPC
    assert "it goes on from step-000004" in str(caught.value)
    run = tmp_path / "run"
    assert names(run / "checkpoints") == ["step-000004"]
    assert find_damage(run / "checkpoints" / "step-000004") is None
    assert not [path for path in run.rglob("*") if "partial" in path.name]
    monkeypatch.setattr(contents, "save_tensors", save_tensors)
    assert not train(tiny)
    assert [record["step"] for record in read_lines(run / "metrics.jsonl")] == list(range(13))


def test_a_full_disk_while_recording(tiny, tmp_path, monkeypatch):
    write = metrics.JsonLines.write

    def full(self, record):
        if record["step"] == 6:
            os.write(self._file.fileno(), b'{"step": 6, "lo')
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)

    monkeypatch.setattr(metrics.JsonLines, "write", full)
    with pytest.raises(OSError, match=r"No space left .* goes on from step-000004.*run"):
        train(tiny)
    monkeypatch.setattr(metrics.JsonLines, "write", write)
    train(tiny)
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(13))


def test_the_best_checkpoint_is_kept(tiny, tmp_path):
    # With this learning rate the held-out loss is lowest early.
    tiny["optimizer"] = {"learning_rate": 0.3, "max_grad_norm": None}
    tiny["schedule"] = {"kind": "constant", "warmup_steps": 6, "init_ratio": 0.001}
    tiny["evaluation"]["every"] = 2
    tiny["checkpoint"] = {"every": 2, "keep": 1, "keep_best": True}
    train(tiny)
    measured = {
        r["step"]: r["heldout_loss"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["step"] % 2 == 0
    }
    best = min((step for step in measured if step), key=measured.__getitem__)
    assert best != 12
    assert names(tmp_path / "run" / "checkpoints") == [f"step-{best:06d}", "step-000012"]


def test_metrics_every_few_steps(tiny, tmp_path):
    tiny["run"]["log_every"] = 5
    train(tiny)
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 4, 5, 8, 10, 12]


def test_nothing_periodic(tiny, tmp_path):
    tiny["evaluation"]["every"] = tiny["sampling"]["every"] = None
    tiny["checkpoint"]["every"] = 1000
    train(tiny)
    run = tmp_path / "run"
    records = read_lines(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert not any("heldout_loss" in record for record in records)
    assert names(run / "checkpoints") == ["step-000012"]
    assert (run / "loss.png").exists()


def test_fine_tuning_starts_from_a_run(tiny, tmp_path):
    train(tiny)
    first = tmp_path / "run"
    last = read_lines(first / "metrics.jsonl")[-1]["heldout_loss"]
    tuned = {
        **tiny,
        "model": {"init_from": str(first), "dropout": 0.1},
        "run": {"steps": 2, "folder": str(tmp_path / "two")},
    }
    tuned["schedule"] = {}
    train(tuned)
    records = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert records[0]["heldout_loss"] == pytest.approx(last, rel=1e-6)
    config = json.loads((tmp_path / "two" / "model" / "config.json").read_text())
    assert (config["num_layers"], config["dropout"]) == (2, 0.1)


def test_tied_embeddings_resume(tiny, tmp_path, monkeypatch):
    tiny["model"] |= {"share_emb": True, "scale_emb": True}
    train({**tiny, "run": {**tiny["run"], "folder": str(tmp_path / "whole")}})
    signal_at(monkeypatch, 6, signal.SIGTERM)
    train(tiny)
    monkeypatch.setattr(trainer, "train_step", train_step)
    train(tiny)
    one, other = (load_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("model", "vocab_size", 100, "vocab_size"),
        ("data", "sequence_length", 100_000, "too small"),
        ("data", "corpus", {"source": "/absent"}, "no such file"),
        ("run", "device", "cuda:99", "cuda:99"),
    ],
)
def test_what_does_not_fit_is_found_before_work(tiny, tmp_path, section, key, value, words):
    tiny[section][key] = value
    with pytest.raises((ValueError, OSError), match=words):
        train(tiny)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_compiled_blocks_train_alike(tiny, tmp_path):
    train({**tiny, "run": {**tiny["run"], "folder": str(tmp_path / "plain")}})
    tiny["run"]["compile"] = True
    train(tiny)
    one, other = ([r["loss"] for r in read_lines(tmp_path / name / "metrics.jsonl")[1:]] for name in ("plain", "run"))
    assert one == pytest.approx(other, rel=1e-4)
