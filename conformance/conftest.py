"""Keeps `not_applicable.py` honest and says at the end what ran, what did not, and why."""

from __future__ import annotations

from collections import Counter

import pytest
from absent import MISSING
from not_applicable import NOT_APPLICABLE


class Table:
    """Follows the listed tests through a run."""

    def __init__(self) -> None:
        self.absent: set[str] = set()
        self.due: set[str] = set()
        self.failed: set[str] = set()
        self.skips: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.absent = NOT_APPLICABLE.keys() - {item.name for item in items}
        for item in items:
            if item.name in NOT_APPLICABLE:
                item.add_marker(pytest.mark.xfail(reason=NOT_APPLICABLE[item.name]))

    def pytest_runtest_logstart(self, location: tuple[str, int | None, str]) -> None:
        self.due |= NOT_APPLICABLE.keys() & {location[2].rpartition(".")[2]}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test fails as listed when it or one of its subtests does.
        if hasattr(report, "wasxfail"):
            if report.skipped:
                self.failed.add(report.location[2].rpartition(".")[2])
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skips[report.longrepr[2].removeprefix("Skipped: ").partition("\n")[0]] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.absent or self.due - self.failed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        def section(title: str, lines: list[str], **colour: bool) -> None:
            if lines:
                terminalreporter.section(title, **colour)
                for line in lines:
                    terminalreporter.write_line(line)

        common = sorted(self.skips.items(), key=lambda pair: (-pair[1], pair[0]))
        section("skipped by Transformers itself", [f"{count:4d}  {reason}" for reason, count in common])
        section(
            "cannot hold for Megalodon (not_applicable.py)",
            [f"{name}: {NOT_APPLICABLE[name]}" for name in sorted(self.failed)],
        )
        section(
            "left out by this source of Transformers' tests, so not run; a checkout has them (--source DIR)",
            [f"tests/{name}" for name in MISSING],
        )
        stale = [f"{name}: there is no such test" for name in sorted(self.absent)]
        stale += [f"{name}: it passes, or Transformers skips it" for name in sorted(self.due - self.failed)]
        section("remove from not_applicable.py", stale, red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table())
