"""The table of promises finds the classes that it should, and says yes and no where it must."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def promises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import state_promises

    yield state_promises
    for name in ("state_promises", "_recurrent_classes", "_report", "_machine"):
        sys.modules.pop(name, None)


def test_recurrent_classes_are_found_in_the_files(promises) -> None:
    found = promises.recurrent_classes()
    assert {"mamba": "MambaForCausalLM", "rwkv": "RwkvForCausalLM"}.items() <= found.items()
    assert "llama" not in found


def test_ours_keeps_all_and_mamba_of_transformers_does_not(promises) -> None:
    ours = promises.measure("kin: mamba", promises.our_classes()["kin: mamba"])
    assert {ours[name] for name in promises.PROMISES} == {"yes"}
    theirs = promises.measure("mamba", lambda: promises.tiny_model("mamba"))
    assert theirs["prompt, then tokens"] == "yes"
    assert theirs["cache used twice"].startswith("**") and theirs["right padding"].startswith("**")
    page = promises.page({"kin: mamba": ours}, {"mamba": theirs})
    assert "cache used twice: 0 of 1" in page and promises.transformers.__version__ in page


def test_a_run_that_was_ended_goes_on(promises, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(promises, "measure", lambda name, make: measured.append(name) or {"beams": name})
    path = tmp_path / "rows.json"
    first = promises.Kept(path)
    assert first.row("a", dict) == {"beams": "a"}
    again = promises.Kept(path)
    assert [again.row(name, dict)["beams"] for name in ("a", "b")] == ["a", "b"] and measured == ["a", "b"]
    monkeypatch.setattr(promises, "versions", lambda: "another")
    assert promises.Kept(path).rows == {}
    again.remove()
    assert not path.exists()
