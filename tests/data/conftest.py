"""Stores for the tests of data."""

import pytest

from tests.s3 import S3Server, s3_server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server on loopback that this process and its children talk to."""
    server = s3_server()
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    return server
