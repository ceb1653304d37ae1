"""Runs by name, and their list."""

from collections.abc import Callable
from pathlib import Path

from toolkit.config.interpolation import fill
from toolkit.config.paths import local_path
from toolkit.config.types import nearest
from toolkit.errors import ConfigError, RunError
from toolkit.experiment.recorded import config_of, has_config
from toolkit.runs import registry
from toolkit.runs.lock import is_locked
from toolkit.runs.registry import RunRecord, find_named, is_run, not_a_run
from toolkit.runs.status import read_status
from toolkit.train.trackers.config import TRACKERS, TrackerConfig
from toolkit.train.trackers.sender import End, Sender


def folder_of(text: str) -> Path:
    """The folder of the run that `toolkit runs` lists under this name; anything else as it is."""
    return Path(find_named(text))


def list_all(root: str, registry_url: str | None) -> list[RunRecord]:
    _check_root(root)
    return registry.list_runs(root, registry_url=registry_url)


def reindex(root: str, registry_url: str | None) -> int:
    _check_root(root)
    return registry.reindex(root, registry_url=registry_url)


def send(run_dir: str, tracker: str | None, say: Callable[[str], object]) -> bool:
    """Send what trackers lack of a run that nobody trains: `tracker`, or those its config enables.
    Whether all of it was sent."""
    folder = folder_of(run_dir)
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


def _send(sender: Sender, end: End, say: Callable[[str], object]) -> bool:
    if not sender.is_up_to_date:
        return sender.run(end)
    say(f"{sender.title}: nothing is missing, by {sender.path}")
    return True


def _check_root(root: str) -> None:
    if root != "runs" and not local_path(root, "--root").is_dir():
        raise ConfigError(f"--root: {root}: no such folder")
