"""A run that is asked to stop before its first step: nothing is lost, and its status says so."""

import contextlib
import logging

from toolkit import signals
from toolkit.errors import EXIT_FAILED, EXIT_STOPPED, RunError
from toolkit.launch.failures import Peers
from toolkit.runs.manager import RunManager

log = logging.getLogger(__name__)


class RunStart(signals.Starting):
    """The part of a run before its first step, while it is asked to stop."""

    def __init__(self) -> None:
        super().__init__(close=self.stop)
        self.run: RunManager | None = None
        self.rank = 0
        self.log_file: logging.Handler | None = None

    def close_log(self) -> None:
        """The last lines have been said."""
        if self.log_file is not None:
            logging.getLogger("toolkit").removeHandler(self.log_file)
            self.log_file.close()

    def stop(self, reason: str) -> int:
        """Note the stop in the run, if there is one by now; the exit code."""
        signals.await_acknowledgement()
        run = self.run
        if run is None:
            return signals.exit_code(reason) if self.rank == 0 else EXIT_STOPPED
        failure = _first_failure(run, self.rank)
        if failure is not None:
            run.close("failed", message=failure, exit_reason="error")
            return EXIT_FAILED
        run.close("stopped", message=f"{reason} before the first step", exit_reason=reason)
        if run.is_main:
            log.info("nothing is lost; continue with: toolkit resume %s", run.folder)
        return EXIT_STOPPED


def _first_failure(run: RunManager, rank: int) -> str | None:
    """What failed on another rank, where that is why this one is being ended."""
    with contextlib.suppress(RunError):
        found = Peers(run, rank=rank, world_size=0).first_failure()
        return None if found is None else f"rank {found.rank} on {found.host}: {found.message}"
    return None
