"""Trackers through their own libraries, offline: the numbers arrive, once, in the same run after a resume."""

from __future__ import annotations

import importlib
import json
import logging
import sys

import pytest

from megalodon.training import trackers
from megalodon.training.trackers import Trackers, TrackingSection, require_libraries

RECORDS = [{"step": step, "loss": 2.0 / (step + 1), "heldout_loss/books": 1.5} for step in range(6)]


def mlflow_section(tmp_path) -> TrackingSection:
    pytest.importorskip("mlflow", reason="needs mlflow: pip install 'megalodon-lm[trackers]'")
    pytest.importorskip("sqlalchemy", reason="needs sqlalchemy, for a tracking store in a file")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    return TrackingSection.model_validate({"mlflow": {"experiment": "whales", "uri": uri}})


def test_mlflow_has_every_number_once_and_the_config(tmp_path):
    section = mlflow_section(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    first = Trackers(section, folder, {"model": {"num_layers": 2}}, -1)
    for record in RECORDS[:4]:
        first.log(record)
    first.close()
    resumed = Trackers(section, folder, {"model": {"num_layers": 2}}, 3)  # goes on from a checkpoint of step 2
    for record in RECORDS[2:]:
        resumed.log(record)
    resumed.close()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=section.mlflow.uri)
    runs = client.search_runs([client.get_experiment_by_name("whales").experiment_id])
    assert len(runs) == 1 and runs[0].info.run_name == "run" and runs[0].info.status == "FINISHED"
    assert runs[0].data.params["model.num_layers"] == "2"
    for name in ("loss", "heldout_loss/books"):
        history = client.get_metric_history(runs[0].info.run_id, name)
        assert sorted((m.step, m.value) for m in history) == [(r["step"], r[name]) for r in RECORDS]


def test_wandb_writes_a_run_offline_and_goes_on_in_it(tmp_path):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'megalodon-lm[trackers]'")
    section = TrackingSection.model_validate({"wandb": {"project": "whales", "mode": "offline"}})
    for sent in (-1, 3):
        tracker = Trackers(section, tmp_path, {"seed": 1}, sent)
        for record in RECORDS[sent + 1 :]:
            tracker.log(record)
        tracker.close()
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(written) == 2 and all(path.stat().st_size > 0 for path in written)
    assert any(b"heldout_loss/books" in path.read_bytes() for path in written)


class Failing:
    name = "failing"

    def __init__(self, *arguments) -> None:
        self.sent = []

    def log(self, step, numbers) -> None:
        self.sent.append((step, numbers))
        raise ConnectionError("the server is gone")

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "MlflowTracker", Failing)
    section = TrackingSection.model_validate({"mlflow": {"experiment": "x"}})
    tracker = Trackers(section, tmp_path, {}, 1)
    with caplog.at_level(logging.WARNING):
        for record in RECORDS:
            tracker.log(record)
    assert [step for step, _ in tracker._trackers["mlflow"].sent] == [2, 3, 4, 5]
    assert len(caplog.records) == 1 and "the server is gone" in caplog.text and "training goes on" in caplog.text


def test_one_that_does_not_open_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no such project\nand a long story")

    monkeypatch.setattr(trackers, "WandbTracker", refuse)
    section = TrackingSection.model_validate({"wandb": {"project": "x"}})
    with pytest.raises(ValueError, match=r"^tracking\.wandb: the run cannot be opened: no such project$"):
        Trackers(section, tmp_path, {}, -1)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_named_before_work(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    values = {"wandb": {"project": "x"}} if name == "wandb" else {"mlflow": {"experiment": "x"}}
    with pytest.raises(ValueError, match=rf"tracking\.{name}: needs the library {name}.*megalodon-lm\[trackers\]"):
        require_libraries(TrackingSection.model_validate(values))
    require_libraries(TrackingSection())


def test_no_tracker_imports_nothing():
    assert importlib.import_module("megalodon.training").TrainConfig().tracking == TrackingSection()
