"""Messages to people: start, end, failure, stall."""

import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.request
from functools import partial
from typing import Any

from toolkit.config.secrets import mask_secrets
from toolkit.runs.status import read_status
from toolkit.threads import Thread, Worker
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_monitors import NotifierConfig, NotifierEvent

log = logging.getLogger(__name__)


class Notifier(Callback):
    """Rank 0 sends, from a thread of its own. A process that is killed sends nothing; its launcher
    or scheduler must tell of that."""

    def __init__(self, config: NotifierConfig) -> None:
        self._config = config
        self._worker = Worker("notifier")
        self._ended: NotifierEvent | None = None
        self._is_closing = threading.Event()
        self._watcher: Thread | None = None

    def pre_train(self) -> None:
        if not self.state.is_main:
            return
        first = f"begins at step {self.state.step}" if self.state.step else "begins"
        self._tell("start", f"{first}, {self.state.environment.layout.description}")
        if "stall" in self._config.events:
            self._watcher = Thread(target=self._watch, name="notifier-stall", daemon=True)
            self._watcher.start()

    def post_train(self) -> None:
        self._ended = "end"

    def on_stop(self) -> None:
        self._ended = "stop"

    def close(self) -> None:
        if not self.state.is_main:
            return
        self._is_closing.set()
        status = read_status(self.state.run.folder)
        if status is not None and status.state == "failed":
            self._tell("failure", f"failed: {status.message}")
        elif self._ended == "stop":
            self._tell("stop", f"stopped ({self.state.stop_request.reason})")
        elif self._ended == "end":
            self._tell("end", "finished")
        else:
            failure = self.state.failure
            self._tell("failure", f"failed: {failure}" if failure else "ended without a result")
        self._worker.stop(self._config.timeout)

    def _watch(self) -> None:
        heartbeat, seen, since, is_told = self.state.heartbeat, -1, time.monotonic(), False
        while not self._is_closing.wait(min(5.0, self._config.stall_seconds / 4)):
            if heartbeat.count != seen:
                if is_told:
                    self._tell("stall", "goes on")
                seen, since, is_told = heartbeat.count, time.monotonic(), False
            elif not is_told and time.monotonic() - since > self._config.stall_seconds:
                is_told = True
                waited = self._config.stall_seconds
                self._tell("stall", f"has made no progress for {waited:g} s ({heartbeat.phase})")

    def _tell(self, event: NotifierEvent, what: str) -> None:
        if event not in self._config.events:
            return
        state, what = self.state, str(mask_secrets(what))
        message: dict[str, Any] = {
            "event": event,
            "run": str(state.run.folder),
            "step": state.step,
            "tokens": state.tokens,
            "loss": state.last_loss,
            "message": what,
            "host": socket.gethostname(),
            "time": time.time(),
        }
        loss = "" if state.last_loss is None else f", loss {state.last_loss:.4f}"
        text = f"{state.run.folder.name}: {what} (step {state.step}{loss}, {message['host']})"
        for send in (self._post, self._slack, self._run):
            self._worker.submit(partial(_safely, send, message, text))

    def _post(self, message: dict[str, Any], text: str) -> None:
        if self._config.webhook:
            self._request(self._config.webhook, {**message, "text": text})

    def _slack(self, message: dict[str, Any], text: str) -> None:
        if self._config.slack:
            self._request(self._config.slack, {"text": text})

    def _run(self, message: dict[str, Any], text: str) -> None:
        if self._config.command:
            subprocess.run(
                self._config.command,
                input=text + "\n",
                text=True,
                env=os.environ | {"TOOLKIT_EVENT": json.dumps(message)},
                timeout=self._config.timeout,
                check=True,
                capture_output=True,
            )

    def _request(self, url: str, body: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self._config.timeout):
            pass


def _safely(send: Any, message: dict[str, Any], text: str) -> None:
    try:
        send(message, text)
    except Exception as error:  # whatever a network or a program does is no reason to end a run
        # Not the error's own text, which may hold the URL.
        reason = mask_secrets(str(getattr(error, "reason", None) or type(error).__name__))
        log.warning("the message of the event %s was not sent: %s", message["event"], reason)
