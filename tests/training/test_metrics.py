"""Metrics survive kills and resumes: each step once, whole lines only."""

from __future__ import annotations

import json

import pytest

from megalodon.training import metrics


def test_resuming_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = metrics.JsonLines(path, 0)
    for step in range(1, 6):
        lines.write({"step": step, "loss": 1 / 3 * step})
    lines.close()
    before = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    lines = metrics.JsonLines(path, 3)
    lines.write({"step": 4, "loss": 9.0})
    lines.close()
    after = path.read_text().splitlines()
    assert after[:3] == before[:3]
    assert [json.loads(line)["step"] for line in after] == [1, 2, 3, 4]


def test_a_last_line_without_its_end_is_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert metrics.read_lines(path) == [{"step": 1}]


def test_separators_inside_text_do_not_split_lines(tmp_path):
    lines = metrics.JsonLines(tmp_path / "s.jsonl", 0)
    record = {"step": 1, "text": "a\u2028b\u0085c\x0cd\ne"}
    lines.write(record)
    lines.write({"step": 2})
    assert metrics.read_lines(tmp_path / "s.jsonl") == [record, {"step": 2}]


def test_log_writes_both_forms_and_the_plot(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 2.0, "heldout_loss": 2.5})
    log.write({"step": 2, "loss": 1.0})
    log.sync()
    log.close()
    assert [record["step"] for record in metrics.read_lines(log.path)] == [1, 2]
    assert any("tfevents" in path.name for path in (tmp_path / "tensorboard").iterdir())
    metrics.plot_losses(log.path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_smoothing_is_unbiased():
    assert metrics.smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert metrics.smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, 7 / 3])
