"""Keeps `not_applicable.py` honest and says at the end what ran, what did not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from absent import MISSING
from not_applicable import NOT_APPLICABLE

_gone: list[str] = []
_skips: Counter[str] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = {item.name for item in items}
    _gone.extend(sorted(set(NOT_APPLICABLE) - names))
    for item in items:
        if item.name in NOT_APPLICABLE:
            item.add_marker(pytest.mark.xfail(reason=NOT_APPLICABLE[item.name], strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(call.excinfo.value) if call.excinfo else "skipped"
        _skips[reason.splitlines()[0] if reason else "no reason given"] += 1
        if item.name in NOT_APPLICABLE:
            report.outcome = "failed"
            report.longrepr = f"{item.name} is listed in not_applicable.py, but Transformers skips it itself: {reason}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _gone and not session.config.option.keyword:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    listed = terminalreporter.stats.get("xfailed", [])
    if listed:
        terminalreporter.section("cannot hold for Megalodon (not_applicable.py)")
        for report in listed:
            name = report.nodeid.rpartition("::")[2]
            write(f"{name}: {NOT_APPLICABLE[name]}")
    if _skips:
        terminalreporter.section("skipped by Transformers itself")
        for reason, count in sorted(_skips.items(), key=lambda pair: (-pair[1], pair[0])):
            write(f"{count:4d}  {reason}")
    if MISSING:
        terminalreporter.section("files of Transformers' tests that this source leaves out, so not run")
        for name in MISSING:
            write(f"tests/{name}")
        write("A checkout of the same version has them: python conformance/run.py --source DIR")
    if _gone and not config.option.keyword:
        terminalreporter.section("listed in not_applicable.py but not among the tests: remove", red=True)
        for name in _gone:
            write(name)
