"""What a person sees, and the numbers in it."""

from __future__ import annotations

import io
from itertools import count

import pytest
import torch
from rich.console import Console

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.training import progress, throughput
from megalodon.training.progress import BarDisplay, LineDisplay, StepClock, StepReport, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def report(step):
    return StepReport(step, 2.5, 12345.6, 0.314, 90)


def test_plain_lines_are_few_and_the_last_is_shown(capsys):
    with LineDisplay(100) as display:
        display.say("hello")
        for step in range(1, 101):
            display.show(report(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hello"
    assert lines[1] == "step 1/100  loss 2.5000  12,346 tokens/s  31.4% of peak  1m30s left"
    assert lines[-1].startswith("step 100/100")
    assert len(lines) < 10


def test_a_bar_shows_the_report_and_messages_as_they_are():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    with BarDisplay(100, console) as display:
        display.say("a [bold] word")
        display.show(report(7))
    assert "a [bold] word" in screen.getvalue()
    assert "7/100" in screen.getvalue()
    assert "loss 2.5000" in screen.getvalue()


def test_no_terminal_no_bar(capsys):
    assert isinstance(progress.make_display(10), LineDisplay)


def test_the_clock_smooths():
    clock = StepClock()
    assert clock.tick(1.0) == 1.0
    assert clock.tick(2.0) == pytest.approx(1.1)


def test_flops_per_token():
    sizes = {"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 64, "ffn_hidden_dim": 48, "norm_num_groups": 4}
    config = MegalodonConfig(vocab_size=100, chunk_size=128, **sizes)
    model = MegalodonForCausalLM(config)
    matrices = model.num_parameters() - 100 * 32
    # A token of a row of 64 sees 32 keys of 16 and values of 64 on average, in each of the 2 layers.
    expected = 6 * matrices + 6 * 2 * 32 * (16 + 64)
    assert throughput.training_flops_per_token(model, config, 64) == expected
    whole_chunk = throughput.training_flops_per_token(model, config, 100_000)
    assert whole_chunk == 6 * matrices + 6 * 2 * 64 * (16 + 64)


def test_tied_embeddings_multiply():
    sizes = {"num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 64, "ffn_hidden_dim": 48, "norm_num_groups": 4}
    config = MegalodonConfig(vocab_size=100, share_emb=True, **sizes)
    model = MegalodonForCausalLM(config)
    assert throughput.training_flops_per_token(model, config, 1) == 6 * (model.num_parameters() + 0.5 * (16 + 64))


def test_the_measured_peak_is_a_speed(monkeypatch):
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 64)
    monkeypatch.setattr(throughput, "SECONDS", 0.01)
    before = torch.get_rng_state()
    assert throughput.measure_peak_flops(torch.device("cpu"), torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_of_a_cpu_is_one_threads_time_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs: time that other programs had does not count."""
    times = count(0, 4)
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 32)
    monkeypatch.setattr(throughput, "SECONDS", 0.01)
    monkeypatch.setattr(throughput.time, "thread_time", lambda: float(next(times)))
    monkeypatch.setattr(throughput, "_processors", lambda: 3)
    before = torch.get_num_threads()
    assert throughput.measure_peak_flops(torch.device("cpu"), torch.float32) == 3 * 2 * 32**3 / 1.0
    assert torch.get_num_threads() == before


def test_busy_neighbours_are_told_of_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(throughput.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(throughput.os, "getloadavg", lambda: (8.25, 1.0, 1.0))
    said = throughput.neighbours()
    assert said is not None and "8.2 of this machine's 2 processors" in said and "OMP_WAIT_POLICY=passive" in said
    monkeypatch.setattr(throughput.os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert throughput.neighbours() is None
    monkeypatch.setattr(throughput.os, "getloadavg", lambda: (8.0, 1.0, 1.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert throughput.neighbours() is None
