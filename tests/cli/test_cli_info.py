"""`megalodon info` shows what runs."""

from __future__ import annotations

import platform

import pytest
import torch

import megalodon
from megalodon import ops
from megalodon.cli import main


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["info"])
    assert exit.value.code == 0
    return {line[:26].strip(): line[26:].strip() for line in capsys.readouterr().out.splitlines()}


def test_versions_hardware_and_back_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    shown = lines(capsys)
    assert shown["megalodon"] == megalodon.__version__
    assert (shown["torch"], shown["Python"]) == (torch.__version__, platform.python_version())
    assert f"{torch.get_num_threads()} threads" in shown["CPU"]
    for operator, (chosen, available) in ops.backends().items():
        assert shown[f"back end, {operator}"].startswith(chosen) or torch.cuda.is_available()
        assert all(name in shown[f"back end, {operator}"] for name in available)
    assert shown[ops.ENVIRONMENT_VARIABLE] == "not set"


def test_forced_back_end_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "reference")
    assert lines(capsys)[ops.ENVIRONMENT_VARIABLE].startswith("reference")
