"""How tests are spread over the processes of pytest-xdist: those of a file stay in one process.

A file's module fixtures and folders are then made once, whatever `--dist` says. All of tests/e2e is
one such group: its files look at the same runs (tests/e2e/conftest.py).
"""

from typing import Any

import pytest

E2E = "tests/e2e/"


def group_of(nodeid: str) -> str:
    """What stays in one process with this test: its file, or all of tests/e2e."""
    file = nodeid.partition("::")[0]
    return E2E if file.startswith(E2E) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByFile(config, log)


class OneProcessPerGroup:
    """Fails the session where two processes ran tests of one group: the scheduler above did not do
    what it is there for (a plugin may change its interface, or bring a scheduler of its own)."""

    def __init__(self) -> None:
        self._processes: dict[str, set[str]] = {}

    @property
    def shared(self) -> list[str]:
        """Groups that several processes ran."""
        return sorted(group for group, found in self._processes.items() if len(found) > 1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        node = getattr(report, "node", None)  # set where the controller of xdist gets a report
        if node is not None:
            self._processes.setdefault(group_of(report.nodeid), set()).add(node.gateway.id)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.shared and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for group in self.shared:
            terminalreporter.line(f"ERROR {group} was run by several processes", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(OneProcessPerGroup())
