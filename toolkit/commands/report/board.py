"""`toolkit board`: the list of runs and their reports, served to browsers of this machine."""

import http.server
import re
import sys
import threading
import urllib.parse
from http import HTTPStatus
from typing import Any

from toolkit.commands.report.page import filled, html
from toolkit.commands.report.reading import read_report
from toolkit.commands.runs.listing import Wanted, check_root, list_all
from toolkit.config.secrets import mask_secrets
from toolkit.errors import ConfigError, ToolkitError
from toolkit.runs.listing import find_run
from toolkit.storage.remote import is_url

_HOSTS = ("localhost", "127.0.0.1")
_ID = re.compile("[0-9a-f]{8}")
_RELOAD_SECONDS = 15
_MOST_RUNS = 40


class BoardServer(http.server.ThreadingHTTPServer):
    """Serves what is in `root` on the loopback interface. It only reads.

    Args:
        port: 0 takes a free one; `server_port` tells it.

    Raises:
        ConfigError: `root` is no folder, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, root: str, registry: str | None = None, port: int = 0) -> None:
        if is_url(root):
            raise ConfigError(f"{root}: a board shows runs of this machine", key="--root")
        check_root(root)
        self.root, self.registry = root, registry
        self.reading = threading.Lock()
        """Pages are made one at a time: each reads whole files."""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            problem = f"cannot listen on port {port}: {error.strerror}; give another"
            raise ConfigError(problem, key="--port") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing of browsers that left before they had a page."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def page(self, path: str, query: dict[str, list[str]]) -> tuple[str, bool] | None:
        """The page at `path`, and whether it will be another one soon; None: there is none."""
        with self.reading:
            if path == "/":
                runs = list_all(self.root, self.registry, Wanted())[::-1]
                return filled("board.html.j2", root=self.root, runs=runs), False
            if path == "/report" and query.get("run"):
                names = list(dict.fromkeys(query["run"][:_MOST_RUNS]))
                folders = [self._folder(name) for name in names]
                report = read_report(folders)
                states = [run.facts.record.state for run in report.runs]
                return html(report), "running" in states
        return None

    def _folder(self, run_id: str) -> Any:
        """Only ids: a path would lead out of the root."""
        if _ID.fullmatch(run_id) is None:
            raise ConfigError("a run is asked for by its id")
        return find_run(run_id, root=self.root, registry_url=self.registry)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: BoardServer

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").lower()
        # A page from elsewhere could have a name that was made to lead here.
        if (host.rpartition(":")[0] or host) not in _HOSTS:
            self._send(HTTPStatus.FORBIDDEN, "only for browsers of this machine", "text/plain")
            return
        path, _, query = self.path.partition("?")
        try:
            found = self.server.page(path, urllib.parse.parse_qs(query))
        except (ToolkitError, ValueError) as error:
            self._send(HTTPStatus.NOT_FOUND, str(mask_secrets(str(error))), "text/plain")
            return
        except OSError as error:  # a folder that went away while it was read
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "text/plain")
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, "no such page; / lists the runs", "text/plain")
            return
        text, is_changing = found
        self._send(HTTPStatus.OK, text, "text/html", reload=is_changing)

    def _send(self, status: HTTPStatus, text: str, kind: str, *, reload: bool = False) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if reload:
            self.send_header("Refresh", str(_RELOAD_SECONDS))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal has the address alone."""
