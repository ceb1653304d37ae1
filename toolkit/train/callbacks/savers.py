"""Records of a run that are not there by default: every package's version, uncommitted changes, and
its last metrics as one file."""

import importlib.metadata
import logging
from typing import Any

from toolkit.errors import RunError
from toolkit.runs.environment import describe_changes
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import write_json_atomic
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import ConfigSaverConfig, MetricSaverConfig

log = logging.getLogger(__name__)


class ConfigSaver(Callback):
    """Adds to what every run keeps in metadata/ (config, command, commit, machine):
    requirements.txt, every installed package as `pip freeze` writes them, and changes.patch, the
    uncommitted changes of the repository's tracked files. What looks like a secret is masked."""

    def __init__(self, config: ConfigSaverConfig) -> None:
        self._config = config

    def pre_train(self) -> None:
        run = self.state.run
        if not self.state.is_main:
            return
        try:
            run.metadata.log(installed_packages(), RUN_FILES.requirements, format="text")
            if self._config.changes and (changes := describe_changes()):
                size = len(changes.encode())
                if size > self._config.max_bytes:
                    log.warning(
                        "config_saver: the uncommitted changes are %d bytes, more than max_bytes "
                        "%d, and are not kept", size, self._config.max_bytes,
                    )  # fmt: skip
                else:
                    run.metadata.log(changes, RUN_FILES.changes, format="text")
        except (OSError, RunError) as error:
            log.warning("config_saver: %s", error)


def installed_packages() -> str:
    """`name==version` of every installed package, a line each, sorted."""
    found = {
        f"{package.metadata['Name']}=={package.version}"
        for package in importlib.metadata.distributions()
        if package.metadata["Name"]
    }
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


class MetricSaver(Callback):
    """metrics/final.json: the last step's metrics and the newest result of every evaluation."""

    state_follows_metrics = True

    def __init__(self, config: MetricSaverConfig) -> None:
        self._train: dict[str, Any] = {}
        self._evaluations: dict[str, dict[str, Any]] = {}

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        if stream == "train":
            self._train = records[-1]
        elif stream == "eval":
            self._evaluations |= {record["name"]: record for record in records}

    def state_dict(self) -> dict[str, Any]:
        return {"train": self._train, "evaluations": self._evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._train, self._evaluations = state["train"], state["evaluations"]

    def close(self) -> None:
        if self.state.is_main and (self._train or self._evaluations):
            found = {"train": _numbers(self._train)}
            found["eval"] = {name: _numbers(r) for name, r in self._evaluations.items()}
            write_json_atomic(self.state.run.path(RUN_FILES.final_metrics), found, sync=False)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """As in the streams: what is not finite is text."""
    return {key: _number(value) for key, value in record.items()}


def _number(value: Any) -> Any:
    is_finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if is_finite else str(value)
