"""`gdrive://` goes through `gdrive_fsspec`, for which a stub stands here."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from toolkit.checkpoint.retention import Retention
from toolkit.errors import ConfigError
from toolkit.launch.pushing import Pusher
from toolkit.runs.lease import Lease
from toolkit.storage.remote import RemoteFolder


class GoogleDriveFileSystem(MemoryFileSystem):
    """What `gdrive_fsspec` promises: fsspec's interface, and options by name."""

    protocol: ClassVar[Any] = "gdrive"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    options: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        self.options.append(options)
        super().__init__(*args)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("gdrive://").strip("/")
        return f"/{path}" if path else ""

    def modified(self, path: str) -> Any:
        raise NotImplementedError

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if options:
            raise TypeError("unexpected keyword argument 'mode'")
        super().pipe_file(path, value)


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    library: Any = ModuleType("gdrive_fsspec")
    library.GoogleDriveFileSystem = GoogleDriveFileSystem
    monkeypatch.setitem(sys.modules, "gdrive_fsspec", library)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gdrive", raising=False)
    monkeypatch.setitem(fsspec.config.conf, "gdrive", {"token": "cache"})
    GoogleDriveFileSystem.clear_instance_cache()
    GoogleDriveFileSystem.store.clear()
    folder = RemoteFolder("gdrive://My runs/first")
    return folder


def test_a_run_is_mirrored_to_a_drive(drive: RemoteFolder, tmp_path: Path) -> None:
    assert GoogleDriveFileSystem.options[-1] == {"token": "cache"}
    lease = Lease(drive, settle_seconds=0.0)
    lease.probe()
    lease.acquire()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "train.jsonl").write_text("1")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "status.json").write_text("{}")
    pusher = Pusher(tmp_path, drive, Retention())
    pusher.begin()
    pusher.push_files()
    assert drive.read("metrics/train.jsonl") == b"1"
    lease.release()
    assert drive.sizes() == {"metadata/status.json": 2, "metrics/train.jsonl": 1}


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdrive_fsspec", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gdrive", raising=False)
    with pytest.raises(ConfigError, match=r"gdrive:// needs .*pip install 'toolkit\[gdrive\]'"):
        RemoteFolder("gdrive://x")
