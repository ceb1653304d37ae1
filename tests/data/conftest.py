"""Stores for the tests of token files."""

import uuid
from pathlib import Path

import pytest

from tests.s3 import BUCKET, S3Server
from toolkit.data.config import StoreConfig


@pytest.fixture
def s3_store(s3: S3Server) -> StoreConfig:
    """An empty folder of it."""
    return StoreConfig(permanent_root=f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def mounted(tmp_path: Path) -> StoreConfig:
    """An empty store that is a plain folder."""
    (tmp_path / "store").mkdir()
    return StoreConfig(permanent_root=str(tmp_path / "store"))
