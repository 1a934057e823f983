"""The launchers in examples/launch start one and the same command, and are well formed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "launch"
COMMAND = ["-m", "megalodon", "train"]
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""How long torchrun waits after a SIGTERM before it kills."""


def after(words: list[str]) -> list[str]:
    """What follows the command in a launcher's words."""
    place = words.index("megalodon") - 1
    assert words[place : place + 3] == COMMAND
    return words[place + 3 :]


def test_slurm_starts_the_command():
    text = (EXAMPLES / "slurm.sbatch").read_text(encoding="utf-8")
    assert after(text.split("srun ")[1].replace("\\\n", " ").split()) == ['"$1"']
    # A signal before the end, so that the run can save, and torchrun lets it.
    (notice,) = re.findall(r"#SBATCH --signal=TERM@(\d+)", text)
    (patience,) = re.findall(rf"^export {PATIENCE}=(\d+)", text, re.MULTILINE)
    assert 30 < int(patience) < int(notice)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm_is_a_shell_script():
    done = subprocess.run(["bash", "-n", EXAMPLES / "slurm.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_kubernetes_starts_the_command():
    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"].keys() == {"nprocPerNode", "elasticPolicy", "pytorchReplicaSpecs"}
    assert job["spec"]["elasticPolicy"].keys() == {"rdzvBackend", "minReplicas", "maxReplicas", "maxRestarts"}
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert container["command"][0] == "torchrun"
    (patience,) = (variable["value"] for variable in container["env"] if variable["name"] == PATIENCE)
    assert 30 < int(patience) < pod["terminationGracePeriodSeconds"]
    assert after(container["command"]) == ["/runs/run.yaml"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_ray_starts_the_command():
    tree = ast.parse((EXAMPLES / "ray_train.py").read_text(encoding="utf-8"))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "subprocess.run"
    )
    assert ast.unparse(call.args[0]) == "[sys.executable, '-m', 'megalodon', 'train', settings['config']]"
    assert {keyword.arg for keyword in call.keywords} == {"env", "check"}


def test_the_readme_starts_the_command():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert "torchrun --standalone --nproc-per-node=8 -m megalodon train run.yaml" in text
