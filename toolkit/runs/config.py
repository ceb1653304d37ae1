"""Config of a run: its names and where it writes."""

from toolkit.config import Config
from toolkit.config.paths import LocalPath, NewName


class RunConfig(Config, kw_only=True):
    """Names of a run and the folders it uses."""

    experiment: NewName = "default"
    """Groups runs: the folder level above the run's own."""
    name: NewName | None = None
    """Name of the run (`--name`); default: a timestamp."""
    root: LocalPath = "runs"
    """Folder of all runs; the run folder is `<root>/<experiment>/<name>`."""
    save_folder: LocalPath | None = None
    """The run folder itself (`--save-folder`), instead of one under `root`. If it holds a
    checkpoint the run is resumed."""
    work_dir: LocalPath | None = None
    """Local scratch folder (`--work-dir`) for unfinished token files; default: beside the data."""
    registry: str | None = None
    """SQLAlchemy URL of the registry; default: SQLite at `<root>/registry.sqlite`."""

    def __post_init__(self) -> None:
        for field in ("experiment", "name"):
            value = getattr(self, field)
            if value is not None and (not value or value in (".", "..") or "/" in value):
                raise ValueError(f"{field} must be a plain folder name, not {value!r}")
