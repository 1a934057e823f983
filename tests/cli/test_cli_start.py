"""How the command starts: help and refusals load no PyTorch, nothing is printed that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon.cli import COMMANDS
from megalodon.importing import after_import

SOURCE = Path(__file__).resolve().parents[2] / "src"
HEAVY = {"torch", "numpy", "transformers", "torchao", "datasets", "pyarrow", "tokenizers", "fastapi", "matplotlib"}
GROUPS = {
    "evaluate": ["perplexity", "memory", "recall", "passkey", "induction"],
    "convert": ["reference", "checkpoint"],
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_help_and_refusals_load_nothing_heavy_and_are_silent() -> None:
    calls = [["--help"], ["--version"], ["trian"], ["train", "--no-such-option"], ["generate"]]
    calls += [[name, "--help"] for name in COMMANDS]
    calls += [[name, task, "--help"] for name, tasks in GROUPS.items() for task in tasks]
    code = f"""
import contextlib, io, sys
from megalodon.cli import main
for call in {calls!r}:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(call)
        except SystemExit:
            pass
    assert said.getvalue().strip(), call
    loaded = {HEAVY!r} & sys.modules.keys()
    assert not loaded, (call, loaded)
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_command_that_runs_says_nothing_of_its_own_libraries() -> None:
    done = run("from megalodon.cli import main; main(['info', '7.3b'])")
    assert done.returncode == 0 and "architecture" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("order", ["import megalodon, transformers", "import transformers, megalodon"])
def test_importing_registers_in_either_order(order: str) -> None:
    done = run(
        f"{order}\nfrom transformers import AutoConfig, AutoModel\n"
        "config = AutoConfig.for_model('gecko', num_layers=1, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16,"
        " cema_ndim=2, chunk_size=4, norm_num_groups=2, vocab_size=9)\n"
        "print(type(AutoModel.from_config(config)) is megalodon.GeckoModel)\n"
        "print(megalodon.ops.cema.__name__, transformers.__spec__.loader.__class__.__name__)"
    )
    assert done.stdout.split() == ["True", "cema", "SourceFileLoader"], done.stderr


def test_importing_alone_loads_neither_pytorch_nor_transformers() -> None:
    done = run("import sys, megalodon\nprint(megalodon.__version__, {'torch', 'transformers'} & sys.modules.keys())")
    assert done.stdout.split()[1:] == ["set()"], done.stderr


def test_ours_follows_theirs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_library.py").write_text("ready = True")
    (tmp_path / "our_part.py").write_text("import their_library\nassert their_library.ready")
    finders = list(sys.meta_path)
    after_import("their_library", "our_part")
    assert "our_part" not in sys.modules and "their_library" not in sys.modules
    __import__("their_library")
    assert "our_part" in sys.modules and sys.meta_path == finders
    for name in ("their_library", "our_part"):
        monkeypatch.delitem(sys.modules, name)
    after_import("sys", "our_part")  # which is there
    assert "our_part" in sys.modules and sys.meta_path == finders
    monkeypatch.delitem(sys.modules, "our_part")
