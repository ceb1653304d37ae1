"""What a resume changes in the config of its run: allowed, and shown."""

from typing import Any

import msgspec

from toolkit.config.layers import leaves
from toolkit.experiment.config import ExperimentConfig

_UNSET = "unset"


def config_changes(before: dict[str, Any], config: ExperimentConfig) -> list[str]:
    """One line for each value that differs between the stored config and `config`.

    Names and folders of the run are left out: a run keeps them, however they are spelled.
    """
    old = dict(leaves(before))
    new = dict(leaves(msgspec.json.decode(msgspec.json.encode(config))))  # lists, as stored
    paths = [path for path in {**old, **new} if not path.startswith("run.")]
    return [
        f"{path}: {_show(old.get(path, _UNSET))} -> {_show(new.get(path, _UNSET))}"
        for path in paths
        if old.get(path, _UNSET) != new.get(path, _UNSET)
    ]


def _show(value: Any) -> str:
    return value if value is _UNSET else msgspec.json.encode(value).decode()
