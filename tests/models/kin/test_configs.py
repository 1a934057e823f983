"""configs/kin: one for each mixer of a language model, checked quickly, trained in a slow test."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megalodon.cli.train import app
from megalodon.models.kin.mixers import MIXERS, mixer_class

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "kin"
NAMES = sorted(name for name in MIXERS if mixer_class(name).causal_mode)


def small(tmp_path: Path) -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = ",".join(str(library / name) for name in ("ast.py", "calendar.py", "heapq.py", "shelve.py"))
    return [
        f"data.corpus.source=[{files}]",
        "data.held_out.fraction=null",
        "data.held_out.documents=1",
        f"data.cache_folder={tmp_path / 'cache'}",
        f"run.folder={tmp_path / 'run'}",
    ]


def train(arguments: list[str]) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_mixer_has_a_config() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_possible(name: str, tmp_path: Path) -> None:
    out = train([str(FOLDER / f"{name}.yaml"), *small(tmp_path), "--dry-run"])
    assert f"mixers: {name}" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_learns(name: str, tmp_path: Path) -> None:
    train([str(FOLDER / f"{name}.yaml"), *small(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.7 * losses[0]


def test_streaming_a_growing_state_is_refused_with_its_cost(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(FOLDER / "attention.yaml"), *small(tmp_path), "data.mode=streamed"])
    message = str(done.exception)
    assert "data.mode: the state of attention grows by up to 4,096 bytes with each token" in message
    assert "a window, such as sliding_attention" in message
