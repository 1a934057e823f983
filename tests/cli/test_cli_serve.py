"""`megalodon serve` before it serves: what it says of a package that is not installed."""

from __future__ import annotations

import sys

import pytest

from megalodon.cli import main


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith(("megalodon.serving", "megalodon.cli.serve"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "model"])
    assert capsys.readouterr().err == "megalodon: serve needs fastapi: pip install 'megalodon-lm[serve]'\n"
