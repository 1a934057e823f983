"""The kin's benchmark runs, and leaves no contestant out."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.mark.slow
def test_a_quick_run_writes_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    kin_speed = importlib.import_module("kin_speed")
    kin_speed.main(mixers=["gla", "attention"], threads=1, rounds=1, quick=True, folder=tmp_path, say=False)
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert text.count("| gla |") == 4 and text.count("| llama (transformers) |") == 3
    assert "(failed)" not in text
