"""What a run folder tells about how its steps were computed. No torch at import."""

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from toolkit.autotune.choices import Choices
from toolkit.config.check import check
from toolkit.config.files import read_json_mapping
from toolkit.config.interpolation import fill
from toolkit.config.layers import DEFAULT_ORIGIN
from toolkit.config.named import look_in
from toolkit.distributed.config import (
    PARALLEL_FIELDS,
    ContextParallelConfig,
    DataParallelConfig,
    EngineName,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.precision import Precision
from toolkit.errors import ConfigError, ErrorList, RunError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.found_data import find_data
from toolkit.metrics.lines import read_records
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import is_run
from toolkit.runs.status import not_a_run
from toolkit.storage.foreign import read_json

RUN_ORIGIN = "run"
"""Of the values that a resume finds in its run folder, which keeps where they are from."""
VERSIONED = ("toolkit", "torch", "accelerate", "deepspeed", "numpy")
"""Libraries that compute."""


class RecordedParallelism(msgspec.Struct, frozen=True, kw_only=True):
    """The configs that ask for a run's engine, whatever the launcher: part of metadata/engine.json
    and of metadata/status.json."""

    dp_config: DataParallelConfig | None = None
    tp_config: TensorParallelConfig | None = None
    cp_config: ContextParallelConfig | None = None
    pp_config: PipelineParallelConfig | None = None
    ep_config: ExpertParallelConfig | None = None


class EngineRecord(RecordedParallelism, frozen=True, kw_only=True):
    """Content of metadata/engine.json: what decides the rounding of an attempt's numbers."""

    name: EngineName
    world_size: int
    precision: Precision
    threads: int
    """Of each process's CPU operations."""
    device: str
    """Model of the GPU, else of the CPU."""
    kernels: dict[str, str] = {}
    """Part of the model -> the kernel that computes it; empty: not recorded."""
    chosen: Choices = Choices()
    """What `auto` became."""

    def __str__(self) -> str:
        configs = {name: getattr(self, name) for name in PARALLEL_FIELDS[1:]}
        axes = [f"{n.removesuffix('_config')} {c.degree}" for n, c in configs.items() if c]
        degrees = f" ({', '.join(axes)})" if axes else ""
        return f"{self.name} x {self.world_size}{degrees}, {self.precision}"


class RecordedStep(msgspec.Struct):
    """What a replay needs of a line of train.jsonl."""

    step: int
    loss: float | str | None = None
    """Text where it is not finite."""
    attempt: int = 1


def metadata_of_attempt(folder: Path, file: str, attempt: int) -> Path:
    """Where a file of `RUN_FILES` is as it was during `attempt`.

    `RunManager.log_metadata` keeps what a later attempt replaces as `<name>.attempt{K}.json`: the
    content from the last change before up to attempt K.
    """
    path = folder / file
    kept = re.compile(rf"{re.escape(path.stem)}\.attempt(\d+){re.escape(path.suffix)}\Z")
    matches = ((kept.match(other.name), other) for other in path.parent.glob(f"{path.stem}.*"))
    later = {int(m[1]): other for m, other in matches if m and int(m[1]) >= attempt}
    return later[min(later)] if later else path


def read_steps(folder: Path) -> dict[int, RecordedStep]:
    """The lines of train.jsonl by step; one that is being written is left out."""
    return {r.step: r for r in read_records(folder / RUN_FILES.train_metrics, RecordedStep)}


def stored_config(folder: Path, attempt: int | None = None) -> dict[str, Any]:
    """The config that a run (or its `attempt`) was started with, as it was written: `${NAME}` and
    relative paths as they are.

    Raises:
        RunError: there is none; tells whether it was lost, or never written.
        ConfigError: it holds no JSON.
    """
    path = folder / RUN_FILES.config
    if attempt is not None:
        path = metadata_of_attempt(folder, RUN_FILES.config, attempt)
    if path.is_file():
        _look_where_it_was_started(folder)
        return read_json_mapping(path)
    if not is_run(folder):
        raise not_a_run(folder)
    if has_config(folder):
        raise RunError(
            f"{path}: is missing, and without it the run cannot go on; restore it, or start a "
            f"new run from its checkpoint with --trainer.load_path={folder}"
        )
    raise RunError(
        f"{folder}: has no {RUN_FILES.config}; it was started from Python, of parts that "
        "no config describes: go on with the same script and start_run(..., resume=True)"
    )


def _look_where_it_was_started(run: Path) -> None:
    """Find the modules of the user's own where the run found them. A run folder may come from
    elsewhere, and modules are code: only folders of this user that nobody else can write to, and
    that did not come with the run."""
    try:
        folders = map(Path, read_json(run / RUN_FILES.command, RunError)["modules"])
        for folder in [f for f in folders if f.is_absolute() and f.is_dir()]:
            about, is_part = folder.stat(), run.resolve().parent in folder.resolve().parents
            is_own = hasattr(os, "geteuid") and about.st_uid == os.geteuid()
            if is_own and about.st_gid != os.getegid():  # a group of one's own is oneself
                is_own = not about.st_mode & stat.S_IWGRP
            if is_own and not about.st_mode & stat.S_IWOTH and not is_part:
                look_in(str(folder))
    except (OSError, RunError, KeyError, TypeError):
        return  # a run of an older release; or nobody needs them


def kept_origins(origins: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What the run in `folder` keeps of `origins`: where it had a value from already, that; no
    defaults, and nothing that is asked for once."""
    before = {}
    with contextlib.suppress(FileNotFoundError, RunError):
        before = read_json(folder / RUN_FILES.origins, RunError)
    kept = {}
    for path, origin in origins.items():
        if origin == RUN_ORIGIN:
            above = (path, *(path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)))
            origin = next((str(before[p]) for p in above if p in before), DEFAULT_ORIGIN)
        if origin != DEFAULT_ORIGIN and path != "trainer.start_anew":
            kept[path] = origin
    return kept


def has_config(folder: Path) -> bool:
    """Whether the run in `folder` has a config, or had one that is lost."""
    return (folder / RUN_FILES.config).is_file() or (folder / RUN_FILES.origins).is_file()


def config_of(folder: Path, attempt: int | None = None) -> ExperimentConfig:
    """`stored_config` as an `ExperimentConfig`. Raises ConfigError too where it is none."""
    path = f"{folder / RUN_FILES.config}: "
    checked = check(stored_config(folder, attempt), ExperimentConfig)
    ErrorList(ConfigError(f"{path}{error}") for error in checked.errors).raise_any()
    return checked.config


def found_config(folder: Path, attempt: int | None = None) -> ExperimentConfig:
    """`config_of`, with `${NAME}` filled in and the run's prepared data found where it is now."""
    return find_data(fill(config_of(folder, attempt)), folder.resolve())


def engine_of(folder: Path, attempt: int) -> EngineRecord | None:
    """The engine of `attempt`; None where it was not recorded."""
    path = metadata_of_attempt(folder, RUN_FILES.engine, attempt)
    try:
        return read_json(path, RunError, EngineRecord)
    except (FileNotFoundError, RunError):
        return None


def versions_of(folder: Path, attempt: int) -> dict[str, str | None]:
    """Versions of the libraries that compute, during `attempt`; empty where not recorded."""
    path = metadata_of_attempt(folder, RUN_FILES.environment, attempt)
    try:
        versions = read_json(path, RunError)["versions"]
        return {name: versions.get(name) for name in VERSIONED}
    except (FileNotFoundError, RunError, KeyError, AttributeError):
        return {}
