"""Config of a run: its names and where it writes."""

import os
import re
from pathlib import Path
from typing import Any

from toolkit.config import Config
from toolkit.config.base import check_not_negative
from toolkit.config.paths import LocalPath, NewName, PathOrURL
from toolkit.storage.remote import is_url
from toolkit.storage.urls import check_stores


class RunConfig(Config, kw_only=True):
    """Names of a run and the folders it uses."""

    experiment: NewName = "default"
    """Groups runs: the folder level above the run's own."""
    name: NewName | None = None
    """Name of the run (`--name`); default: a timestamp."""
    root: LocalPath = "runs"
    """Folder of all runs; the run folder is `<root>/<experiment>/<name>`."""
    save_folder: PathOrURL | None = None
    """The run folder itself (`--save-folder`), instead of one under `root`. If it holds a
    checkpoint the run is resumed. A URL (s3://, gs://, ...): the run is in `work_dir` and mirrored
    to the URL, which is then its `mirror`."""
    mirror: PathOrURL | None = None
    """URL that the run folder is copied to while it trains, and that the run can be resumed from
    on another machine."""
    mirror_wait: float = 600.0
    """How long the end of a run waits until everything is at `mirror`, at most."""
    work_dir: LocalPath | None = None
    """Local scratch folder (`--work-dir`) for unfinished token files (default: beside the data)
    and for the run where `save_folder` is a URL (default: toolkit/runs in the user's cache)."""
    registry: str | None = None
    """SQLAlchemy URL of the registry; default: SQLite at `<root>/registry.sqlite`."""

    def __post_init__(self) -> None:
        for field in ("experiment", "name"):
            value = getattr(self, field)
            if value is not None and (not value or value in (".", "..") or "/" in value):
                raise ValueError(f"{field} must be a plain folder name, not {value!r}")
        check_not_negative(self, "mirror_wait")
        if self.mirror is not None and not is_url(self.mirror) and "${" not in self.mirror:
            raise ValueError(f"mirror: {self.mirror!r} is no URL; a folder is file:///its/path")
        if self.mirror is not None and self.save_folder is not None and is_url(self.save_folder):
            raise ValueError("mirror: save_folder is a URL already; give one of them")
        check_stores(self, "mirror", "save_folder")

    @property
    def folder(self) -> str | None:
        """Where on this machine `save_folder` is."""
        if self.save_folder is None or not is_url(self.save_folder):
            return self.save_folder
        return str(folder_of_url(self.save_folder, self.work_dir))

    def on_this_machine(self) -> dict[str, Any]:
        """What to replace so that a URL as `save_folder` becomes the `mirror` of a local one."""
        if self.save_folder is None or not is_url(self.save_folder):
            return {}
        name = re.sub(r"[^\w.-]+", "-", self.save_folder.rstrip("/").rpartition("/")[2]).strip(".-")
        return {
            "save_folder": self.folder,
            "mirror": self.save_folder.rstrip("/"),
            "name": self.name or name or None,
        }


def folder_of_url(url: str, work_dir: str | None = None) -> Path:
    """Where on this machine the run at `url` is: in `work_dir`, or in the user's cache."""
    import xxhash

    url = url.rstrip("/")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(work_dir) if work_dir is not None else Path(cache, "toolkit", "runs")
    words = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[-80:].strip(".-")
    place = root.expanduser() / f"{words}-{xxhash.xxh3_64_hexdigest(url.encode())[:8]}"
    return Path(os.path.abspath(place))
