"""The first signal asks, the second stops at once, and the handlers are put back."""

from __future__ import annotations

import os
import signal

from megalodon.training.interrupt import StopRequest


def test_the_first_signal_is_a_request(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert "SIGTERM: finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_signal_stops_at_once():
    child = os.fork()
    if child == 0:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
