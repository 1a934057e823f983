"""The comparison of builds: each kind of case runs, and the table says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_builds


@pytest.mark.parametrize("case", ["weights", "decode-2-20", "slots-2", "prefill-16", "train-1-16", "trainbf16-1-16"])
def test_each_kind_of_case_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"num_layers": 1, "model_dim": 64, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32, "chunk_size": 16}
    monkeypatch.setitem(cpu_builds.MODELS, "16m", tiny)
    assert cpu_builds.prepare(case, "16m", "float32")() > 0


def test_table_takes_ratios_within_rounds() -> None:
    samples = {"before": [[4.0, 3.0], [8.0]], "now": [[1.0], [2.0, 4.0]]}
    lines = cpu_builds.table([{"case": "c", "model": "m", "dtype": "d", "samples": samples}], "before").splitlines()
    assert lines[-1] == "| c | m d | now | 1000.00 | 2000.00 | 3.50 | 3.00 |"
