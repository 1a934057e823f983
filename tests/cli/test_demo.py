"""The demo as `make demo` runs it, on a few files and for a few steps."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = ",".join(str(library / name) for name in ("ast.py", "bisect.py", "calendar.py", "heapq.py", "shelve.py"))
    sizes = ("num_layers=1", "model_dim=32", "z_dim=16", "value_dim=32", "ffn_hidden_dim=48", "norm_num_groups=4")
    return [
        *(f"model.{size}" for size in sizes),
        f"data.corpus.source=[{files}]",
        "data.held_out.documents=1",
        f"data.cache_folder={tmp_path / 'cache'}",
        f"run.folder={tmp_path / 'run'}",
        "run.steps=2",
        "schedule.warmup_steps=0",
    ]


def run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, str(DEMO), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_learns_tokens_trains_measures_and_writes(arguments: list[str], tmp_path: Path):
    out = run(arguments)
    assert "learned 2048 tokens from 4 files" in out
    assert all(f"\n  {name} " in out for name in ("megalodon", "gzip -9", "xz -9"))
    for name in ("loss.png", "metrics.jsonl", "perplexity.png", "perplexity.json", "model/tokenizer.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
        assert name.split("/")[0] in out or name == "perplexity.json"

    again = run(arguments)
    assert "learned" not in again and "step 2/2" not in again, "all that was done stays done"
    assert again.split("bits per byte of")[1] == out.split("bits per byte of")[1], "and the model is the same"


@pytest.mark.slow
def test_the_demo_takes_a_tokenizer_that_it_is_given(arguments: list[str], tmp_path: Path):
    out = run([*arguments, "tokenizer=bytes"])
    assert "learned" not in out and not (tmp_path / "run-tokenizer").exists()
