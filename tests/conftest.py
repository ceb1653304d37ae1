"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu") if not os.path.exists("/dev/nvidia0") else None

from tests.workers import WorkerPool  # noqa: E402


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Warm processes for multi-rank tests."""
    pool = WorkerPool()
    yield pool
    pool.close()
