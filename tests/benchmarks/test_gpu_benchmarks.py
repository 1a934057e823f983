"""The GPU benchmarks, rehearsed on a CPU: every section has its rows, and every number is one."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton runs on Linux only")

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
Rows = list[dict[str, Any]]


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A script as a user calls it, on one thread; its standard error is shown if a test fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("MEGALODON_BACKEND", "TRITON_INTERPRET"):  # the scripts choose for themselves
        environment.pop(name, None)
    command = [sys.executable, str(BENCHMARKS / "gpu" / script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    print(done.stderr)
    return done


def rehearsed(tmp_path: Path, script: str, *options: str) -> dict[str, Rows]:
    """The sections of all results that a rehearsal writes."""
    done = run(script, "--rehearse", "--output", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout
    sections: dict[str, Rows] = {}
    for path in tmp_path.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["machine"]["backend"] == "triton"
        sections |= result["sections"]
        page = path.with_suffix(".md").read_text()
        assert "its numbers mean nothing" in page
        assert all(f"## {section}" in page for section in result["sections"])
    for row in (row for rows in sections.values() for row in rows):
        assert "failed" not in row and row.get("right", True), row
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    return sections


def names(rows: Rows, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in rows]


# Rehearsals ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_operators(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "operators.py")
    streaming, cases = ("cema", "timestep_norm", "timestep_decay_norm"), ("new", "carried state", "documents")
    operators = (*streaming, "chunk_attention", "sliding_chunk_attention")
    expected = [(o, d, c) for d in ("bfloat16", "float32") for o in operators for c in cases]
    assert names(found["checks"], "operator", "dtype", "case") == expected
    assert all(row["right"] for row in found["checks"])
    pairs = [(operator, backend) for operator in streaming for backend in ("triton", "blocked")]
    assert names(found["times"], "operator", "backend") == pairs
    assert all(row["forward_over_floor"] > 0 for row in found["times"])
    assert names(found["decode"], "operator", "rows") == [
        (operator, rows) for rows in (1, 2) for operator in ("attention", "cema", "timestep_norm")
    ]
    ways = [
        "triton-fused",
        "triton-strips",
        "plain softmax, strips of 128",
        "sdpa",
        "sdpa, values in slices",
        "flex attention",
    ]
    assert set(ways) <= {row["way"] for row in found["attention"]}
    assert all("forward_ms" in row for row in found["attention"] if row["way"] != "flex attention")
    assert names(found["flatness"], "operator") == [(operator,) for operator in streaming]


@pytest.mark.slow
def test_layers_and_decoding(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "models.py", "--section", "layer", "--section", "decode")
    layers = names(found["layer"], "layer", "compiled")
    assert layers == [("ours", False), ("llama", False)] * 2 + [("ours", True), ("llama", True)] * 2
    for ours, llama in zip(found["layer"][::2], found["layer"][1::2], strict=True):
        assert all(ours[key] == llama[key] for key in ("compiled", "batch", "length"))
        assert llama["ours_over_this"] == pytest.approx(llama["ms"] / ours["ms"])
    graphs = [(way, batch) for batch in (1, 4) for way in ("graph", "graph, compiled")]
    steps = [("reading", 1), ("eager", 1), *graphs]
    assert names(found["decode"], "way", "batch") == steps * 2
    assert all(row["over_floor"] <= row["over_weights"] for row in found["decode"] if row["way"] == "graph")


def test_contexts_that_cannot_be_read_in_time_are_left_out_and_nothing_is_written_unasked() -> None:
    before = sorted((BENCHMARKS / "results").iterdir())
    done = run("models.py", "--rehearse", "--section", "decode", "--read-seconds", "0")
    assert done.returncode == 0 and "its numbers mean nothing" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if "| reading |" in line]
    assert row.startswith("| 40 | 1 | reading | would take") and "to read: 0 s are left" in row
    assert sorted((BENCHMARKS / "results").iterdir()) == before


@pytest.mark.slow
def test_training_steps(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "models.py", "--section", "training", "--section", "small")
    variants = [(compiled, checkpointing) for compiled in (False, True) for checkpointing in (True, False)]
    assert names(found["training"], "compiled", "checkpointing") == variants
    assert names(found["small"], "model", "compiled") == [
        (model, compiled) for compiled in (False, True) for model in ("ours", "llama")
    ]


@pytest.mark.slow
def test_a_mesh_of_one_and_its_plan(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "parallel_throughput.py")
    assert [len(found[section]) for section in ("step", "plan")] == [1, 1]


PORT = """
class MegalodonBlock(torch.nn.Linear):
    def __init__(self, config, layer):
        super().__init__(config["model_dim"], config["model_dim"])
    def forward(self, x):
        return super().forward(x), None
"""


@pytest.mark.slow
def test_peers(tmp_path: Path) -> None:
    """The port is a package of our own name: a stand-in for it must not take the place of ours."""
    package = tmp_path / "port/src/megalodon"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import modeling_megalodon\nMegalodonConfig = dict\n")
    (package / "modeling_megalodon.py").write_text(f"import torch\n{PORT}")
    rows = rehearsed(tmp_path, "peers.py", "--port", str(tmp_path / "port"), "--authors", str(tmp_path))["peers"]
    timed = [row["layer"] for row in rows if "ms" in row]
    assert timed == ["ours", "ours", "llama", "llama", "the port", "the port"]
    assert all(row["parameters"] > 0 for row in rows if "ms" in row)
    notes = {row["layer"]: row["note"] for row in rows if "note" in row}
    assert list(notes) == ["mamba-2", "gated linear attention", "the authors'"]
    assert notes["the authors'"] == f"{tmp_path} has no megalodon/models/mega.py"


@pytest.mark.slow
def test_no_step_begins_when_the_minutes_are_over(tmp_path: Path) -> None:
    done = run("everything.py", "--rehearse", "--minutes", "0", "--output", str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("| not begun | 0 |") == 8


@pytest.mark.slow
def test_everything(tmp_path: Path) -> None:
    done = run("everything.py", "--rehearse", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("| passed |") == 8
    log = (tmp_path / "gpu_everything.log").read_text()
    assert "==== parallel" in log and "test_cema_triton.py" in log


def operators() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("_kernel_sources", BENCHMARKS / "gpu" / "_kernel_sources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digests()


@pytest.mark.parametrize(("operator", "digest"), operators().items(), ids=operators())
def test_kernels_compile_as_the_library_launches_them(operator: str, digest: str) -> None:
    """As the landed table has it, if it was made from these sources with this Triton; else they are compiled here."""
    landed = json.loads((BENCHMARKS / "results" / "gpu_kernels.json").read_text())
    rows = [row for row in landed["kernels"] if row["case"].startswith(operator)]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90a"}
    assert all(row["registers"] <= 255 and row["fits"] and not row["spilled"] for row in rows)
    if landed["sources"].get(operator) != digest or landed["triton"] != triton.__version__:
        done = run("compile_kernels.py", "--only", operator)
        assert done.returncode == 0, done.stderr.splitlines()[-1]
        assert all(f" {architecture}" in done.stdout for architecture in ("sm_80", "sm_90a"))


@pytest.mark.slow
def test_every_kernel_compiles_as_the_library_launches_it(tmp_path: Path) -> None:
    done = run("compile_kernels.py", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    rows = json.loads((tmp_path / "gpu_kernels.json").read_text())["kernels"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90a"}
    assert all(row["registers"] <= 255 and row["fits"] and not row["spilled"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("script", ["operators.py", "everything.py"])
def test_without_a_gpu_the_message_says_so(script: str) -> None:
    done = run(script)
    assert done.returncode == 2 and "a CUDA device: none is available" in done.stderr and "Traceback" not in done.stderr


# What the scripts share ----------------------------------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`_gpu` with a CPU for its device; importing it chooses a back end, which must not outlive the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    module = importlib.import_module("_gpu")
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    return module


def test_median_and_spread_leave_out_the_first_calls(shared: ModuleType) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    median, spread = shared.milliseconds(call, repeats=9)
    assert len(calls) == 11 and 1 <= median < 40 and spread < 40
    calls.clear()
    shared.milliseconds(call, repeats=9, seconds=0.0)
    assert len(calls) == 5


def test_rows_that_fail_do_not_end_a_script(shared: ModuleType) -> None:
    def raising(reason: Exception) -> Any:
        def run() -> dict[str, Any]:
            raise reason

        return shared.attempt(run, name="x")

    assert raising(torch.OutOfMemoryError("of no matter")) == {"name": "x", "note": "out of memory"}
    assert raising(shared.LeftOut("not installed: it")) == {"name": "x", "note": "not installed: it"}
    assert raising(KeyError("k")) == {"name": "x", "failed": "KeyError: 'k'"}
    assert shared.attempt(lambda: {"ms": 1.0}, name="x").keys() == {"name", "ms", "peak_gib"}


def test_every_row_is_on_disk_at_once(shared: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared, "REHEARSAL", True)
    shared.ceilings.cache_clear()
    report = shared.Report("name", "A title", {}, tmp_path)
    shared.ceilings.cache_clear()
    for count, row in enumerate(({"way": "a", "ms": 1.5, "right": True}, {"way": "b", "note": "out | of memory"}), 1):
        report.add("section", row)
        written = json.loads((tmp_path / "gpu_name-rehearsal.json").read_text())
        assert len(written["sections"]["section"]) == count
    page = (tmp_path / "gpu_name-rehearsal.md").read_text()
    assert "| way | ms | right | note |\n| --- | --: | --- | --- |\n| a | 1.5 | yes |  |" in page
    assert report.finish()
    report.add("section", {"way": "c", "right": False})
    assert not report.finish()


def test_a_step_is_cut_off_with_all_that_it_started(shared: ModuleType, tmp_path: Path) -> None:
    everything = importlib.import_module("everything")
    grandchild = f'{sys.executable} -c \'import time; time.sleep(2); open("{tmp_path}/late", "w")\''
    code = f"import subprocess, time; print('begun', flush=True); subprocess.Popen({grandchild!r}, shell=True)\n"
    step = everything.Step("slow", 1, ["-c", code + "time.sleep(60)"], script=False)
    everything.run(step, 1.0, tmp_path, False)
    assert step.outcome == "cut off at 1 s" and step.seconds < 3
    assert "begun" in (tmp_path / everything.LOG).read_text()
    failing = everything.Step("failing", 1, ["-c", "raise SystemExit(3)"], script=False)
    everything.run(failing, 5.0, tmp_path, False)
    assert failing.outcome == "failed (status 3)"
    assert "| slow | cut off at 1 s | 1 |" in everything.summary([step])
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()
