"""Runs by name, and their list."""

from collections.abc import Callable
from pathlib import Path

from toolkit.config.interpolation import fill
from toolkit.config.paths import local_path
from toolkit.config.types import nearest
from toolkit.errors import ConfigError, RunError
from toolkit.experiment.recorded import config_of, has_config
from toolkit.launch.mirror import push
from toolkit.launch.remote_run import local_copy, run_and_step, runs_at
from toolkit.runs import registry
from toolkit.runs.lock import is_locked
from toolkit.runs.registry import RunRecord, find_named, is_run, not_a_run
from toolkit.runs.status import read_status
from toolkit.storage.remote import is_url
from toolkit.train.trackers.config import TRACKERS, TrackerConfig
from toolkit.train.trackers.sender import End, Sender


def folder_of(text: str, work_dir: str | None = None, *, checkpoints: bool = True) -> Path:
    """The folder of the run that `toolkit runs` lists under this name; a copy of the run, or step,
    at a URL (see `local_copy`); anything else as it is."""
    if is_url(text):
        return local_copy(text, work_dir, checkpoints=checkpoints)
    return Path(find_named(text))


def url_of_run(text: str) -> str | None:
    """The run that a URL, of it or of one of its checkpoints, leads to; None for other words."""
    return run_and_step(text)[0] if is_url(text) else None


def list_all(root: str, registry_url: str | None) -> list[RunRecord]:
    if is_url(root):
        return runs_at(root)
    _check_root(root)
    return registry.list_runs(root, registry_url=registry_url)


def reindex(root: str, registry_url: str | None) -> int:
    _check_root(root)
    return registry.reindex(root, registry_url=registry_url)


def send(run_dir: str, tracker: str | None, say: Callable[[str], object]) -> bool:
    """Send what trackers lack of a run that nobody trains: `tracker`, or those its config enables.
    Whether all of it was sent."""
    # Of a copy, nobody would find what was noted of what trackers have.
    folder = local_path(find_named(run_dir), "RUN_DIR")
    if not is_run(folder):
        raise not_a_run(folder)
    if is_locked(folder):
        raise RunError(
            f"{folder}: another process is writing this run, and its trackers are being told"
        )
    callbacks = fill(config_of(folder)).trainer.callbacks if has_config(folder) else None
    configs: dict[str, TrackerConfig] = {
        field: kind() if callbacks is None else getattr(callbacks, field)
        for field, kind in TRACKERS.items()
    }
    if tracker is not None and tracker not in configs:
        hint = nearest(tracker, configs)
        known = f"did you mean {hint!r}?" if hint else f"there are {', '.join(configs)}"
        raise ConfigError(f"no such tracker: {tracker!r}; {known}", key="--tracker")
    chosen = [c for f, c in configs.items() if f == tracker or (tracker is None and c.enabled)]
    if not chosen:
        raise ConfigError(f"{folder}: its config enables no tracker; name one with --tracker")
    status = read_status(folder)
    end = End()
    end.come("killed" if status is None or status.state == "running" else status.state)
    for config in chosen:
        config.check()
    senders = [Sender(folder, config, attempt=None, warn=say, tell=say) for config in chosen]
    is_sent = [_send(sender, end, say) for sender in senders]  # each, also after one that is down
    return all(is_sent)


def push_run(run_dir: str, say: Callable[[str], object]) -> str:
    """Bring a run that nobody trains to its `run.mirror`, which is returned."""
    folder = folder_of(run_dir).resolve()
    config = fill(config_of(folder))
    url = config.run.mirror
    if url is None:
        raise ConfigError(f"{folder}: has no run.mirror, the URL that it would be brought to")
    if is_locked(folder):
        raise RunError(f"{folder}: another process is writing this run, and mirrors it")
    push(folder, url, config.trainer.callbacks.checkpointer.retention, say)
    return url


def _send(sender: Sender, end: End, say: Callable[[str], object]) -> bool:
    if not sender.is_up_to_date:
        return sender.run(end)
    say(f"{sender.title}: nothing is missing, by {sender.path}")
    return True


def _check_root(root: str) -> None:
    if root != "runs" and not local_path(root, "--root").is_dir():
        raise ConfigError(f"--root: {root}: no such folder")
