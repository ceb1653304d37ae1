"""The sender: brings one service what a run folder holds, and remembers how far it has come.

The folder is the queue: however long a service is down, nothing is held in memory and nothing is
lost. What was sent stands in trackers/<name>.json, so the next attempt, on any machine, goes on
where this one ended. Steps that are trained again after a crash are not sent again.
"""

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.secrets import mask_secrets
from toolkit.errors import RunError
from toolkit.metrics.lines import last_record
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import read_status
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import read_json
from toolkit.storage.locks import locked
from toolkit.train.trackers.config import TrackerConfig
from toolkit.train.trackers.rows import FILES, Rows
from toolkit.train.trackers.service import Outcome, Service, TrackedRun
from toolkit.train.trackers.services import open_service
from toolkit.wording import count, shortened

_FACTS = {"git": RUN_FILES.git, "environment": RUN_FILES.environment, "command": RUN_FILES.command}
_SECONDS_FOR_FACTS = 5.0
"""How long the first rows wait for git and environment, which are looked at in the background."""
_LONGEST_PAUSE = 60.0

LATER = "what is missing is sent by the next `toolkit resume`, or by `toolkit runs send RUN_DIR`"

Say = Callable[[str], object]


class Sent(msgspec.Struct, kw_only=True):
    """Content of trackers/<name>.json: how far a service has been told."""

    key: str
    """See `TrackedRun`."""
    run_id: str | None = None
    """The run there."""
    row: int = -1
    """The last step of which a row was sent."""
    steps: dict[str, int] = {}
    """Stream -> the last step of it that was sent."""
    sending: bool = False
    """A call to the service did not return: it may have some of the rows that follow."""
    where: str | None = None
    """Where to look at it."""
    finished_on: str | None = None
    """The machine on which the service marked the end of the run, with all it was sent delivered.
    """


class End:
    """How and whether training has ended."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.outcome: Outcome | None = None

    def come(self, outcome: Outcome) -> None:
        """Training ended like this; the first word counts."""
        if self.outcome is None:
            self.outcome = outcome
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after `seconds` at most."""
        return self._event.wait(seconds)


class _Session:
    """A run that is open at a service, and how far it is."""

    def __init__(self, service: Service, sent: Sent, rows: Callable[[], Rows]) -> None:
        self.service, self.sent, self._new_rows = service, sent, rows
        self.rows = rows()
        self.facts: dict[str, Any] = {}

    def go_back(self) -> None:
        """To what was sent: rows that were taken are read again."""
        self.rows = self._new_rows()


class Sender:
    """Sends the metrics of the run in `folder` to one service.

    attempt: of the run; once there is a later one, this sender stops, and sends nothing of what
    that one has written. None: nobody trains the run; its last step is sent however it ended.
    """

    def __init__(
        self, folder: Path, config: TrackerConfig, *, attempt: int | None, warn: Say, tell: Say
    ) -> None:
        # Libraries are given places in it, some as URLs.
        self._folder, self._config, self._attempt = folder.absolute(), config, attempt
        self._warn, self._tell = warn, tell
        self.path = self._folder / RUN_FILES.trackers / f"{config.field}.json"
        self._session: _Session | None = None

    @property
    def title(self) -> str:
        """What the service is called."""
        return self._config.title

    def behind_message(self) -> str:
        """That steps were not sent, or that the end was not marked; and what does it."""
        if self.missing_steps:
            return f"{self._config.title}: {count(self.missing_steps, 'step')} not sent; {LATER}"
        return (
            f"{self._config.title}: every step is sent, but it took longer than flush_seconds "
            f"({self._config.flush_seconds:g}) to end the run there; the next `toolkit resume`, or "
            "`toolkit runs send RUN_DIR`, asks again"
        )

    @property
    def missing_steps(self) -> int:
        """Steps that are recorded and were not sent."""
        recorded = last_record(self._folder / RUN_FILES.train_metrics).get("step", 0)
        return max(0, int(recorded) - max(0, self._load().row))

    @property
    def is_up_to_date(self) -> bool:
        """Whether the service was told from this machine all that the folder holds, and that the
        run has ended."""
        sent = self._load()
        if sent.finished_on != socket.gethostname():
            return False
        rows = Rows(self._folder, self._config.streams, sent=sent.steps, row=sent.row)
        rows.read()
        return not rows.take(is_over=True) and rows.row == sent.row

    def run(self, end: End) -> bool:
        """Send until the end; whether everything was sent. Errors of the service are a warning."""
        self.path.parent.mkdir(exist_ok=True)
        interval, pause, has_warned = self._config.send_interval, 0.0, False
        with locked(self.path.with_suffix(".lock")):
            while True:
                is_over = end.wait(pause)
                try:
                    is_current = self.send(end.outcome if is_over else None)
                except Exception as error:
                    pause = min(max(2 * pause, interval), _LONGEST_PAUSE)
                    if not has_warned:
                        has_warned = True
                        after = "" if self._attempt is None else "; training goes on"
                        self._warn(f"{self._config.title}: {_line(error)}{after}")
                    if is_over:
                        return False
                    continue
                if is_over or not is_current:
                    return True
                pause = interval

    def send(self, outcome: Outcome | None) -> bool:
        """Send what there is; with an `outcome`, to the end. False: a later attempt has begun,
        whose own sender goes on."""
        session = self._session = self._session or self._open()
        sent = session.sent
        self._describe(session)
        # After a stop or a crash the last step may get more: it waits for the next attempt.
        is_over = outcome in ("finished", "failed") or self._attempt is None
        while True:
            session.rows.read()
            if self._is_superseded():
                return False
            rows = session.rows.take(is_over=is_over)
            if not rows and session.rows.row == sent.row:
                break
            again, sent.sending = sent.sending, True
            self._save(sent)
            try:
                session.service.send(rows, again=again)
            except BaseException:
                session.go_back()
                raise
            sent.row, sent.steps, sent.sending = session.rows.row, dict(session.rows.sent), False
            self._save(sent)
        if outcome is not None:
            session.service.finish(outcome)
            sent.finished_on = socket.gethostname()
            self._save(sent)
        return True

    def _open(self) -> _Session:
        sent, status = self._load(), read_status(self._folder)
        if status is None:
            raise RunError(f"{self._folder}: is no run")
        run = TrackedRun(self._folder, status.name, status.experiment, sent.key)
        sent.finished_on = None
        self._save(sent)
        service = open_service(self._config, run, lambda text: self._warn(_masked(text)))
        opened = service.open(sent.run_id)
        sent.run_id, sent.where = opened.run_id, mask_secrets(opened.where)
        last = opened.last_step
        if last is not None:
            sent.sending = False
            if last != sent.row:
                # More than was noted before a crash, or less: what a library held went with it.
                sent.row, sent.steps = last, dict.fromkeys(FILES, last)
        self._save(sent)
        if sent.where:
            self._tell(f"{self._config.title}: {sent.where}")
        streams = self._config.streams
        return _Session(
            service, sent, lambda: Rows(self._folder, streams, sent=sent.steps, row=sent.row)
        )

    def _describe(self, session: _Session) -> None:
        """Store config, git, environment and command, when they are there or have changed."""
        deadline = time.monotonic() + (0.0 if session.facts else _SECONDS_FOR_FACTS)
        facts = self._read_facts()
        while not facts.keys() >= _FACTS.keys() and time.monotonic() < deadline:
            time.sleep(0.1)
            facts = self._read_facts()
        if facts != session.facts:
            session.service.describe(facts)
            session.facts = facts

    def _read_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for name, file in (("", RUN_FILES.config), *_FACTS.items()):
            with contextlib.suppress(FileNotFoundError, RunError):
                found = read_json(self._folder / file, RunError, dict)
                facts |= {name: found} if name else found
        return mask_secrets(facts)

    def _is_superseded(self) -> bool:
        """Asked after reading: what was read then is this attempt's."""
        if self._attempt is None:
            return False
        status = read_status(self._folder)
        return status is None or status.attempt != self._attempt

    def _load(self) -> Sent:
        with contextlib.suppress(FileNotFoundError):
            return read_json(self.path, RunError, Sent)
        return Sent(key=uuid.uuid4().hex)

    def _save(self, sent: Sent) -> None:
        write_json_atomic(self.path, sent)


def _line(error: Exception) -> str:
    """An error of a library as one line."""
    text = " ".join(str(error).split())
    # Masked whole: a secret that is cut would not look like one.
    return shortened(_masked(f"{type(error).__name__}: {text}" if text else repr(error)))


def _masked(text: str) -> str:
    return str(mask_secrets(text))
