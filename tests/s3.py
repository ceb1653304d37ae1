"""A real S3 server over HTTP on loopback, one for all tests, which can be told to misbehave."""

import functools
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"

Fault = Callable[[str, str], str | None]
"""(method, path) -> None, "503", "403" or "reset"."""


class S3Server:
    """moto's server behind a layer that records requests and injects faults."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        self._inner = server._server.app
        server._server.app = self._serve
        self.endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        self.requests: list[tuple[str, str, str]] = []
        """Method, path with query, range header."""
        self._fault: Fault = lambda method, path: None
        self._make_bucket()

    @property
    def environ(self) -> dict[str, str]:
        """What points a process to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        self._fault = fault
        try:
            yield
        finally:
            self._fault = lambda method, path: None

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if query := environ.get("QUERY_STRING"):
            path += "?" + query
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        fault = self._fault(method, path)
        if fault == "reset":
            # In the middle of what is sent: a client that still waits to be told to send it may not
            # see that the connection is gone, and then waits for its time limit.
            environ["wsgi.input"].read(1)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if fault is not None:
            code = {"503": "ServiceUnavailable", "403": "AccessDenied"}[fault]
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            _drain(environ)
            start_response(
                f"{fault} {code}",
                [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))],
            )
            return [] if method == "HEAD" else [body]
        return self._inner(environ, start_response)

    def _make_bucket(self) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="tester",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)


def times(count: int, fault: str, method: str = "", part: str = "") -> Fault:
    """The first `count` requests with that method and part of the path fail."""
    left = [count]

    def decide(own_method: str, path: str) -> str | None:
        if own_method.startswith(method) and part in path and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    return decide


@functools.cache
def s3_server() -> S3Server:
    """Started when first asked for; ends with the process."""
    return S3Server()


def _drain(environ: dict[str, Any]) -> None:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    environ["wsgi.input"].read(length)
