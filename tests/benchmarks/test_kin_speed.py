"""The kin's benchmark runs, leaves no contestant out, goes on where it was ended, and says what its samples say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def kin_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("kin_speed")


def small(folder: Path) -> dict[str, Any]:
    return {"mixers": ["gla", "attention", "hedgehog"], "threads": 1, "quick": True, "folder": folder, "say": False}


@pytest.mark.slow
def test_a_quick_run_writes_every_section(tmp_path: Path, kin_speed: ModuleType) -> None:
    kin_speed.main(**small(tmp_path))
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert text.count("| gla |") == 4 and text.count("| hedgehog |") == 5  # gla does not read across
    for peer in (kin_speed.LLAMA, *kin_speed.TWINS, *kin_speed.TWINS.values()):
        assert text.count(f"\n| {peer} |") == 3 + (peer in kin_speed.TWINS)
    assert "(failed)" not in text


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on(tmp_path: Path, kin_speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = kin_speed.measure

    def ended_after_two(group: Any, *rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(group.key)
        return measure(group, *rest)

    options = {**small(tmp_path), "section": [kin_speed.Section.two_way, kin_speed.Section.cross], "length": [32, 64]}
    monkeypatch.setattr(kin_speed, "measure", ended_after_two)
    with pytest.raises(KeyboardInterrupt):
        kin_speed.main(**options)
    (kept,) = tmp_path.glob("*.json")
    first = json.loads(kept.read_text())
    assert list(first["groups"]) == measured and "| 32 |" in kept.with_suffix(".md").read_text()
    monkeypatch.setattr(kin_speed, "measure", lambda group, *rest: measured.append(group.key) or measure(group, *rest))
    kin_speed.main(**options)
    whole = json.loads(kept.read_text())
    assert list(whole["groups"]) == measured and len(set(measured)) == 4
    assert all(whole["groups"][key] == cells for key, cells in first["groups"].items())
    with pytest.raises(typer.BadParameter, match=r"budget_seconds 120\.0, not 1\.0"):
        kin_speed.main(**options, budget=1.0)


def test_every_mixer_stands_in_one_group_of_a_section(kin_speed: ModuleType) -> None:
    for section in kin_speed.Section:
        names = [name for group in kin_speed.contestants(section, None, True) for name in group[1:]]
        assert len(names) == len(set(names)) and "attention" not in names
    assert {"mamba2", "mamba2, its twin", "mamba2 (transformers)", "gla"} <= {
        name for group in kin_speed.contestants(kin_speed.Section.train, None, True) for name in group
    }


def test_the_page_says_what_the_samples_say(kin_speed: ModuleType) -> None:
    def cell(name: str, length: int, *seconds: float) -> Any:
        samples = [kin_speed.Sample(number, 1, {"train": value}) for number, value in enumerate(seconds)]
        return kin_speed.Cell(name, length, samples=samples, peak_bytes_added=2_000_000_000)

    seconds = {512: (1.0, 2.0), 2048: (4.0, 4.0), 8192: (32.0, 8.0)}  # attention's, gla's
    measured = {
        f"train {length}: attention, gla": {
            "attention": cell("attention", length, exact, exact * 3),  # the machine was busy in the second round
            "gla": cell("gla", length, own, own * 3),
        }
        for length, (exact, own) in seconds.items()
    }
    table = kin_speed.Table(measured, {})
    train = kin_speed.Section.train
    assert [table.times(train, length, "gla", "attention") for length in seconds] == [0.5, 1.0, 4.0]
    assert table.text(train, 512, "gla") == "128 (0.50; 2.00 GB)"
    assert table.faster_from(train, list(seconds), "gla") == "about 2,000"
    assert table.faster_from(train, [512], "gla") == "" and table.faster_from(train, [8192], "gla") == "8,192 or less"
    assert table.text(train, 512, "based") == ""
