"""Configs of TensorBoard and of the trackers: what is sent, under which names, and to whom."""

import contextlib
import importlib.util
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.named import named
from toolkit.config.paths import LocalPath
from toolkit.errors import ConfigError, ErrorList
from toolkit.train.callbacks.config_base import CallbackConfig

MetricStream = Literal["train", "eval", "network", "system"]
Stream = Literal["train", "eval", "network", "system", "samples"]


class TensorBoardConfig(CallbackConfig, kw_only=True):
    """Event files for TensorBoard in the run folder's tb/."""

    streams: tuple[MetricStream, ...] = ("train", "eval", "network", "system")
    """What is written."""

    def build(self) -> Any:
        """A callback that does nothing: `MetricStreams` writes the files."""
        return named("toolkit.train.callbacks.base:Callback")()


class TrackerConfig(CallbackConfig, kw_only=True):
    """Base of the trackers' configs. Metrics are sent by a process of its own, which reads them
    from the run folder."""

    implementation = "toolkit.train.callbacks.tracker:Tracker"
    field: ClassVar[str]
    """Its name in `trainer.callbacks`, and of its extra."""
    title: ClassVar[str]
    """Its name in messages."""
    module: ClassVar[str]
    """What it imports."""

    enabled: bool = False
    """On: metrics are sent."""
    streams: tuple[Stream, ...] = ("train", "eval", "network", "system", "samples")
    """What is sent: metrics by stream, and text samples."""
    name: str | None = None
    """Name of the run there; null: the run's name."""
    project: str | None = None
    """The project (MLflow, Aim: experiment); null: the run's experiment."""
    tags: tuple[str, ...] = ()
    """Tags of the run there."""
    notes: str | None = None
    """A description of the run there."""
    send_interval: float = 5.0
    """Seconds between two looks for new metrics."""
    flush_seconds: float = 10.0
    """How long the end of training waits until everything is sent."""

    def __post_init__(self) -> None:
        check_positive(self, "send_interval")
        check_not_negative(self, "flush_seconds")

    @property
    def key(self) -> str:
        """Path of this config in an experiment."""
        return f"trainer.callbacks.{self.field}"

    def check(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError where the library is not installed, or credentials are missing."""
        if importlib.util.find_spec(self.module) is None:
            raise ConfigError(
                f'needs the library {self.module}: pip install "toolkit[{self.field}]"; '
                f"--{self.key}.enabled=false trains without it",
                key=self.key,
            )
        if (problem := self.missing_credentials(environ)) is not None:
            raise ConfigError(f"no login for {self.title} is found here; {problem}", key=self.key)

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        """What to do about credentials that are not there; None: nothing."""
        return None


class WandBConfig(TrackerConfig, kw_only=True):
    """Weights & Biases."""

    field = "wandb"
    title = "W&B"
    module = "wandb"

    entity: str | None = None
    """User or team that owns the project; null: the account's default."""
    group: str | None = None
    """Group of runs."""
    mode: Literal["online", "offline"] | None = None
    """`offline`: files in the run folder, for `wandb sync`; null: `WANDB_MODE`, else online."""

    def mode_in(self, environ: Mapping[str, str]) -> str:
        """The mode, from the config or the environment."""
        return self.mode or environ.get("WANDB_MODE") or "online"

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        if self.mode_in(environ) != "online" or environ.get("WANDB_API_KEY"):
            return None
        if environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return None
        host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
        files = (environ.get("NETRC"), "~/.netrc", "~/_netrc")
        if any(_is_in_netrc(path, host) for path in files if path):
            return None
        return f"set WANDB_API_KEY, run `wandb login`, or --{self.key}.mode=offline"


class TrackioConfig(TrackerConfig, kw_only=True):
    """trackio: a database on this machine, or a Space of the Hugging Face Hub."""

    field = "trackio"
    title = "trackio"
    module = "trackio"

    group: str | None = None
    """Group of runs."""
    space_id: str | None = None
    """Space to send to, `user/name`; null: `TRACKIO_SPACE_ID`, else this machine."""
    folder: LocalPath | None = None
    """Folder of the database; null: `TRACKIO_DIR`, else trackio's own."""

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        if not (self.space_id or environ.get("TRACKIO_SPACE_ID")):
            return None
        home = environ.get("HF_HOME") or "~/.cache/huggingface"
        path = environ.get("HF_TOKEN_PATH") or f"{home}/token"
        if environ.get("HF_TOKEN") or _any_file(path):
            return None
        return f"set HF_TOKEN, run `hf auth login`, or --{self.key}.space_id=null"


class MLflowConfig(TrackerConfig, kw_only=True):
    """MLflow."""

    field = "mlflow"
    title = "MLflow"
    module = "mlflow"

    tracking_uri: str | None = None
    """Server or store; null: `MLFLOW_TRACKING_URI`, else the folder mlruns/ beside the run."""

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        uri = self.tracking_uri or environ.get("MLFLOW_TRACKING_URI") or ""
        if not uri.startswith("databricks") or environ.get("DATABRICKS_TOKEN"):
            return None
        if environ.get("DATABRICKS_CLIENT_ID") or _any_file("~/.databrickscfg"):
            return None
        return "set DATABRICKS_HOST and DATABRICKS_TOKEN, or choose another tracking_uri"


class CometConfig(TrackerConfig, kw_only=True):
    """Comet."""

    field = "comet"
    title = "Comet"
    module = "comet_ml"

    entity: str | None = None
    """Workspace; null: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: archives in the run folder, for `comet upload`."""

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        given = environ.get("COMET_API_KEY") or environ.get("COMET_CONFIG")
        if self.mode == "offline" or given or _any_file("~/.comet.config", ".comet.config"):
            return None
        return f"set COMET_API_KEY, run `comet login`, or --{self.key}.mode=offline"


class ClearMLConfig(TrackerConfig, kw_only=True):
    """ClearML."""

    field = "clearml"
    title = "ClearML"
    module = "clearml"

    mode: Literal["online", "offline"] = "online"
    """`offline`: a session folder of ClearML's, for `Task.import_offline_session`."""

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        if self.mode == "offline" or environ.get("CLEARML_OFFLINE_MODE"):
            return None
        pair = environ.get("CLEARML_API_ACCESS_KEY") and environ.get("CLEARML_API_SECRET_KEY")
        if pair or _any_file(environ.get("CLEARML_CONFIG_FILE") or "~/clearml.conf"):
            return None
        return (
            "set CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY, run `clearml-init`, or "
            f"--{self.key}.mode=offline"
        )


class SwanLabConfig(TrackerConfig, kw_only=True):
    """SwanLab."""

    field = "swanlab"
    title = "SwanLab"
    module = "swanlab"

    entity: str | None = None
    """Workspace; null: the account's own."""
    group: str | None = None
    """Group of runs."""
    mode: Literal["cloud", "local", "offline"] = "cloud"
    """`local`: files for `swanlab watch`; `offline`: files for `swanlab sync`."""

    def missing_credentials(self, environ: Mapping[str, str]) -> str | None:
        home = environ.get("SWANLAB_ROOT") or environ.get("SWANLAB_SAVE_DIR") or "~/.swanlab"
        if self.mode != "cloud" or environ.get("SWANLAB_API_KEY") or _any_file(f"{home}/.netrc"):
            return None
        return f"set SWANLAB_API_KEY, run `swanlab login`, or --{self.key}.mode=offline"


class AimConfig(TrackerConfig, kw_only=True):
    """Aim."""

    field = "aim"
    title = "Aim"
    module = "aim"

    repo: str | None = None
    """Folder or server (`aim://host:port`) of the repository; null: .aim/ beside the run."""


TRACKERS: dict[str, type[TrackerConfig]] = {
    config.field: config
    for config in (
        WandBConfig,
        TrackioConfig,
        MLflowConfig,
        CometConfig,
        ClearMLConfig,
        SwanLabConfig,
        AimConfig,
    )
}
"""Name in `trainer.callbacks` -> its config."""


def _any_file(*paths: str) -> bool:
    return any(Path(path).expanduser().is_file() for path in paths)


def _is_in_netrc(path: str, host: str) -> bool:
    with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
        return netrc.netrc(Path(path).expanduser()).authenticators(host) is not None
    return False


def check_trackers(callbacks: Any) -> None:
    """`TrackerConfig.check` of each one that is enabled in `trainer.callbacks`."""
    found = ErrorList()
    for field in TRACKERS:
        config: TrackerConfig = getattr(callbacks, field)
        if config.enabled:
            found.ask(config.check)
    found.raise_any()
