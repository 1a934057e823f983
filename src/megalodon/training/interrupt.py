"""SIGINT and SIGTERM ask a run to stop after the step it is in; the second one stops it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STANDARD_ERROR = 2


class StopRequest:
    """A context in which the two signals are taken as a request. `signal` is the one that came, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        message = f"\n{self.signal.name}: finishing this step, then saving and stopping; once more stops at once\n"
        # Not print: the signal may have come in the middle of one, which cannot be entered twice.
        os.write(STANDARD_ERROR, message.encode())
