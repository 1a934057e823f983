"""`megalodon info` shows what runs."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

import megalodon
from megalodon import GeckoConfig, GeckoForCausalLM, ops
from megalodon.cli import main


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["info", *arguments])
    assert exit.value.code == 0
    return {line[:36].strip(): line[36:].strip() for line in capsys.readouterr().out.splitlines()}


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


def test_the_bytes_of_a_state(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gecko, megalodon_7b = lines(capsys, "gecko-7b"), lines(capsys, "7.3b")
    assert gecko["architecture"] == "gecko" and gecko["parameters"] == "7,385,817,088"
    sizes = [int(shown["state, bfloat16"].split()[0].replace(",", "")) for shown in (gecko, megalodon_7b)]
    assert 1.6e9 < sizes[0] < 1.7e9 and 16e6 < sizes[1] < 18e6
    tiny = GeckoConfig(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, cema_ndim=4, chunk_size=8,
                       norm_num_groups=4, vocab_size=40)  # fmt: skip
    tiny.save_pretrained(tmp_path)
    shown = re.findall(r"\d[\d,]*", lines(capsys, str(tmp_path))["state, float32"])
    model = GeckoForCausalLM(tiny).eval()
    with torch.no_grad():
        states = [model(torch.zeros(1, n, dtype=torch.long), use_cache=True).past_key_values for n in (16, 23)]
    assert [states[0].nbytes, states[1].nbytes] == [int(number.replace(",", "")) for number in shown]


def test_no_such_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["info", "gecko-8b"])
    assert exit.value.code == 2
    assert "'gecko-8b' is neither a model folder nor one of" in capsys.readouterr().err
