"""`megalodon train` as a person runs it: a real process on real files, stopped, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megalodon.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
TIMES = ("seconds", "tokens_per_second", "flop_utilisation")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small model on a few files of the standard library, 60 steps."""
    library = Path(sysconfig.get_paths()["stdlib"])
    values = {
        "model": {
            "num_layers": 1,
            "model_dim": 32,
            "z_dim": 16,
            "value_dim": 32,
            "ffn_hidden_dim": 48,
            "norm_num_groups": 4,
            "cema_ndim": 4,
            "chunk_size": 16,
        },
        "data": {
            "corpus": {"source": [str(library / name) for name in ("ast.py", "bisect.py", "calendar.py", "heapq.py")]},
            "held_out": {"documents": 1},
            "sequence_length": 32,
            "batch_size": 4,
            "cache_folder": str(tmp_path / "cache"),
        },
        "run": {"steps": 60, "folder": str(tmp_path / "run")},
        "evaluation": {"every": 50, "max_tokens": 500},
        "checkpoint": {"every": 20},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_here(*arguments) -> None:
    """The command in this process, which must end well."""
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, arguments)])
    assert caught.value.code == 0


def start(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "megalodon", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def lines(path: Path) -> list[dict]:
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in lines(folder / "metrics.jsonl")):
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached: {process.communicate()}")


def test_terminated_killed_and_continued_equals_left_alone(config, tmp_path, capsys):
    run_here(config, f"run.folder={tmp_path / 'whole'}")
    assert "done: the model is in" in capsys.readouterr().out
    run = tmp_path / "run"

    process = start(config)
    wait_for_step(process, run, 7)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 143, error
    assert "SIGTERM: finishing this step" in error
    assert "the same command goes on from there" in out
    stopped_at = lines(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / f"step-{stopped_at:06d}").is_dir()

    process = start(config)
    wait_for_step(process, run, stopped_at + 8)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    run_here(config)
    assert f"resuming from {run / 'checkpoints'}" in capsys.readouterr().out
    without_times = [
        [
            {key: value for key, value in record.items() if key not in TIMES}
            for record in lines(folder / "metrics.jsonl")
        ]
        for folder in (tmp_path / "whole", run)
    ]
    assert without_times[0] == without_times[1]
    assert [record["step"] for record in without_times[1]] == list(range(61))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", run))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_one_message(config, capsys, tmp_path):
    assert "there is no config file" in fails(capsys, tmp_path / "absent.yaml")
    message = fails(capsys, config, "run.precision=float16", "optimizer.lr=1")
    assert "use bfloat16" in message
    assert "optimizer.lr: unknown key; there are betas, " in message
    (tmp_path / "empty.txt").touch()
    assert "no text" in fails(capsys, config, f"data.corpus.source={tmp_path / 'empty.txt'}")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    assert "binary" in fails(capsys, config, f"data.corpus.source={tmp_path / 'binary.txt'}")


def test_dry_run_prints_a_config_that_reads_back(config, capsys, tmp_path):
    run_here(config, "optimizer.learning_rate=2e-4", "--dry-run")
    printed = capsys.readouterr()
    assert "parameters" in printed.err
    (tmp_path / "resolved.yaml").write_text(printed.out)
    run_here(tmp_path / "resolved.yaml", "--dry-run")
    assert capsys.readouterr().out == printed.out
    assert not (tmp_path / "run").exists()


def test_divergence_has_status_1(config, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", str(config), "optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null", "run.steps=20"])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert "stopped at step" in message
    assert "from token" in message


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_example_config_is_right(path, capsys):
    run_here(path, "--dry-run")
    assert "parameters" in capsys.readouterr().err
