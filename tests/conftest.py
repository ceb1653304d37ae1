"""Fixtures shared by all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# `auto` is the same on every machine and in every run: fp32 on CPUs, and nothing compiled.
os.environ.setdefault("TOOLKIT_MEASURE", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A process that compiles does so by itself: the helpers that it would start cost more than they do.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from tests.s3 import S3Server, s3_server
from tests.spreading import pytest_configure, pytest_xdist_make_scheduler  # noqa: F401
from tests.workers import WorkerPool, warm_pool

# A busy machine takes its time over an example.
hypothesis.settings.register_profile("toolkit", deadline=None)
hypothesis.settings.load_profile("toolkit")


def pytest_sessionstart(session: pytest.Session) -> None:
    """`-m gpu` runs what needs a GPU. All other tests are of CPUs, whatever the machine has, and so
    are the processes that they start."""
    if session.config.option.markexpr.strip() != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _loggers_as_at_first() -> None:
    """Whatever files ran before in this process, a file finds the loggers that it finds alone."""
    logger = logging.getLogger("toolkit")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _clean_examples() -> Iterator[None]:
    """Tests leave no runs and no data beside the examples, from where some of them start."""
    examples = Path(__file__).parents[1] / "examples"
    places = [examples / name for name in ("runs", "data")]
    before = [place for place in places if place.exists()]
    yield
    assert [place for place in places if place.exists()] == before


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Warm processes for multi-rank tests."""
    pool = warm_pool()
    yield pool
    pool.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server on loopback that this process and its children talk to."""
    server = s3_server()
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    return server
