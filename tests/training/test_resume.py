"""A run that is killed at any instant and started again ends as one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megalodon.files import load_tensors
from megalodon.training import launch, start
from megalodon.training.checkpoint import list_checkpoints
from megalodon.training.config_file import check_config
from megalodon.training.metrics import read_lines
from megalodon.training.progress import LineDisplay

TIMES = ("seconds", "tokens_per_second", "flop_utilisation")

# Forks children that train, each of which kills itself at one of its operations on the disk (a sync, a renaming, a line
# of metrics), ever later, until one comes to the end.
DRIVER = """
import os, signal, sys
from pathlib import Path
import matplotlib.pyplot, torch.utils.tensorboard, yaml  # once, before forking
from megalodon.training import launch, metrics, start
from megalodon.training.config_file import check_config

config = launch.resolve(check_config(yaml.safe_load(Path(sys.argv[1]).read_text()), "test"), "test")

def train_and_die_at(number):
    left = number
    def deadly(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    os.fsync = deadly(os.fsync)
    Path.rename = deadly(Path.rename)
    Path.replace = deadly(Path.replace)
    metrics.JsonLines.write = deadly(metrics.JsonLines.write)
    start.train(config)

launch.measure_peak_flops = lambda device, dtype: 1e9
kills = 0
for number in [*map(int, sys.argv[2:]), 10**9]:
    child = os.fork()
    if child == 0:
        try:
            train_and_die_at(number)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        kills += 1
    else:
        print("kills", kills, "status", status)
        sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(launch, "measure_peak_flops", lambda device, dtype: 1e9)


def train(values):
    return start.train(launch.resolve(check_config(values, "test"), "test"), LineDisplay(values["run"]["steps"]))


def outcome(folder: Path):
    """All that must not depend on interruptions: metrics without times, samples, and every tensor of the last step."""
    metrics = [{k: v for k, v in r.items() if k not in TIMES} for r in read_lines(folder / "metrics.jsonl")]
    last = list_checkpoints(folder / "checkpoints")[-1]
    files = [folder / "model" / "model.safetensors", *sorted(last.rglob("*.safetensors"))]
    tensors = {f"{path.relative_to(folder)}:{name}": t for path in files for name, t in load_tensors(path).items()}
    trainer = json.loads((last / "trainer.json").read_text())
    return metrics, read_lines(folder / "samples.jsonl"), tensors, trainer["loader"], trainer["tokens"]


def assert_same(one: Path, other: Path):
    (*plain, tensors, loader, tokens), (*other_plain, other_tensors, other_loader, other_tokens) = map(
        outcome, (one, other)
    )
    assert plain == other_plain
    assert (loader, tokens) == (other_loader, other_tokens)
    assert tensors.keys() == other_tensors.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, other_tensors[name])]
    assert different == []


def elsewhere(values, tmp_path, name, **run):
    return {**values, "run": {**values["run"], "folder": str(tmp_path / name), **run}}


@pytest.mark.parametrize(
    ("changes", "instants"),
    [
        ({"mode": "streamed"}, [2, 8, 13, 22, 31, 33, 36, 38, 43, 47, 52, 59, 66, 73]),
        pytest.param({"mode": "packed", "isolate": False}, [30, 47], marks=pytest.mark.slow),
    ],
)
def test_killed_at_many_instants(tiny, tmp_path, changes, instants):
    values = {
        **tiny,
        "data": {**tiny["data"], **changes},
        "model": {**tiny["model"], "dropout": 0.1},  # draws from the generator in every step
        "checkpoint": {"every": 3, "keep": 2},
    }
    values["run"] = {**values["run"], "accumulation_steps": 2}
    train(elsewhere(values, tmp_path, "whole"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "tiny.yaml"), *map(str, instants)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.rpartition("kills ")[2].split()[0])
    assert kills >= min(8, len(instants)), done.stdout
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(13))
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_stays_finished(tiny, tmp_path, capsys):
    train(tiny)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()  # as if killed just before it was written
    train(tiny)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_another_config_is_refused(tiny, tmp_path):
    train(tiny)
    changed = {
        **tiny,
        "optimizer": {"learning_rate": 1e-4},
        "data": {**tiny["data"], "sequence_length": 16},
        "model": {**tiny["model"], "num_layers": 3},
        "checkpoint": {"every": 5},
    }
    with pytest.raises(ValueError) as caught:
        train(changed)
    message = str(caught.value)
    for key in ("model.num_layers: 2 before, 3 now", "data.sequence_length: 24 before, 16 now", "learning_rate"):
        assert key in message
    assert "checkpoint.every" not in message


def test_another_corpus_is_refused(tiny, tmp_path):
    train(tiny)
    (tmp_path / "texts" / "0.txt").write_text("another text\n" * 100)
    with pytest.raises(ValueError, match=r"text is another than it was: 3 documents with .* tokens before, 3 "):
        train(tiny)


def test_never_refuses_and_changes_nothing(tiny, tmp_path):
    train(tiny)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=r"run\.resume: never"):
        train(elsewhere(tiny, tmp_path, "run", resume="never"))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_a_damaged_checkpoint_is_refused_and_the_previous_continues(tiny, tmp_path):
    train(elsewhere(tiny, tmp_path, "whole"))
    train(tiny)
    damaged = tmp_path / "run" / "checkpoints" / "step-000012" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError) as caught:
        train(tiny)
    message = str(caught.value)
    assert str(damaged) in message
    assert "step-000008" in message
    assert "run.resume=previous" in message
    train(elsewhere(tiny, tmp_path, "run", resume="previous"))
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_two_processes_do_not_share_a_folder(tiny, tmp_path):
    from megalodon.training.run_folder import RunFolder

    lock = RunFolder(tmp_path / "run").open()
    with pytest.raises(ValueError, match="another process is training"):
        train(tiny)
    lock.release()
