"""The first signal asks, the second stops at once, and the handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from megalodon.training.interrupt import StopRequest

TWICE = """
import os, signal
from megalodon.training.interrupt import StopRequest
with StopRequest(print) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""


def test_the_first_signal_is_a_request():
    before = signal.getsignal(signal.SIGTERM)
    said = []
    with StopRequest(said.append) as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert "SIGTERM" in said[0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_signal_stops_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert done.returncode == 130
    assert "not reached" not in done.stdout
