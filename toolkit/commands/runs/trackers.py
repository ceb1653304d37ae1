"""`toolkit runs send` and `push`: what others lack of a run that nobody trains."""

from collections.abc import Callable

from toolkit.commands.runs.named import folder_of
from toolkit.config.interpolation import fill
from toolkit.config.paths import local_path
from toolkit.config.types import nearest
from toolkit.errors import ConfigError, RunError
from toolkit.experiment.recorded import config_of, has_config
from toolkit.launch.mirror import push
from toolkit.runs.listing import find_named
from toolkit.runs.lock import is_locked
from toolkit.runs.registry import is_run
from toolkit.runs.status import not_a_run, read_status
from toolkit.train.trackers.config import TRACKERS, TrackerConfig
from toolkit.train.trackers.sender import End, Sender


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
