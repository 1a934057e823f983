"""Real launches: two agents ("nodes") with one rendezvous, a rank killed in the middle, a signal that saves."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_training import assert_same_run, records, train, values, with_changes  # noqa: F401 - `values` is a fixture
from transformers import AutoModelForCausalLM

from megalodon.cli import main
from megalodon.files import load_tensors
from megalodon.training.checkpoint import list_checkpoints


def torchrun(arguments: list[str], config: Path) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *arguments, "-m", "megalodon", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*command, str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def children(process: int) -> list[int]:
    """The processes that a running one has started."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []  # it has just ended
    return [int(number) for number in text.split()]


def wait_for_checkpoint(folder: Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if (folder / "checkpoints" / f"step-{step:06d}").is_dir():
            return
        time.sleep(0.01)
    for process in processes:
        process.kill()
    pytest.fail("\n".join(process.communicate()[0] for process in processes))


def write(tmp_path: Path, values: dict) -> Path:  # noqa: F811
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_two_agents_and_a_killed_rank_end_as_one_process(values, tmp_path):  # noqa: F811
    assert train(with_changes(values, steps=40, folder="whole")) == "done"
    config = write(tmp_path, with_changes(values, steps=40, shard=2))
    shared = [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-backend=c10d", "--rdzv-id=test"]
    agents = [
        torchrun(["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.2", *shared], config)
        for _ in range(2)
    ]
    wait_for_checkpoint(tmp_path / "run", 6, agents)
    (victim,) = children(agents[1].pid)
    os.kill(victim, signal.SIGKILL)
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert any("resuming from" in output for output in outputs)
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(41))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ranks_killed_at_random_instants_end_as_one_process(values, tmp_path, seed):  # noqa: F811
    """Whatever a rank is doing: starting, meeting, a step, a measurement, a save."""
    generator = random.Random(seed)
    assert train(with_changes(values, steps=60, folder="whole")) == "done"
    config = write(tmp_path, with_changes(values, steps=60, chunk=2))
    agent = torchrun(["--standalone", "--nproc-per-node=2", "--max-restarts=4", "--monitor-interval=0.2"], config)
    killed = 0
    while killed < 4 and agent.poll() is None:
        time.sleep(generator.uniform(1, 15))
        if len(ranks := children(agent.pid)) == 2:
            os.kill(generator.choice(ranks), signal.SIGKILL)
            killed += 1
    output = agent.communicate(timeout=600)[0]
    assert (agent.returncode, killed > 0) == (0, True), output
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(61))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_signal_saves_and_the_checkpoint_is_converted(values, tmp_path, capsys):  # noqa: F811
    config = write(tmp_path, with_changes(values, steps=5000, chunk=2))
    agent = torchrun(["--standalone", "--nproc-per-node=2"], config)
    wait_for_checkpoint(tmp_path / "run", 3, [agent])
    agent.send_signal(signal.SIGTERM)
    output = agent.communicate(timeout=600)[0]
    assert agent.returncode != 0
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert records(tmp_path / "run")[-1]["step"] == int(last.name.removeprefix("step-")), output
    with pytest.raises(SystemExit) as ended:
        main(["convert", "checkpoint", str(last), str(tmp_path / "model"), "--dtype", "bfloat16"])
    assert ended.value.code == 0, capsys.readouterr().err
    weights = load_tensors(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.int64)).logits).all()
    with pytest.raises(SystemExit) as ended:
        main(["convert", "checkpoint", str(tmp_path / "model"), str(tmp_path / "other")])
    assert ended.value.code == 2
    assert "no sharded checkpoint" in capsys.readouterr().err
