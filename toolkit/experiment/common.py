"""What has to be the same on all machines of a run, known before there are process groups."""

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

import toolkit
from toolkit.config import leaves
from toolkit.distributed.ranks import ENGINE
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recorded import VERSIONED
from toolkit.launch.messages import HASH, Common
from toolkit.runs.environment import installed_version


def common_content(config: ExperimentConfig) -> dict[str, Any]:
    """The config without what may differ: folders, and text that is known by its tokens."""
    content = config.to_dict()
    for name in ("description", "run", "dataset", "store"):
        del content[name]
    return {**content, "sequence_length": config.dataset.sequence_length}


def common_of(config: ExperimentConfig) -> Common:
    """Versions of libraries, the config's values by path (texts hashed), and the run's name."""
    versions = {name: installed_version(name) for name in VERSIONED}
    values = dict(leaves(common_content(config))) | {"--engine": os.environ.get(ENGINE)}
    run = config.run
    names = [run.experiment, *([] if run.name is None else [run.name])]
    return Common(
        run="/".join(names) if run.save_folder is None else Path(run.save_folder).name,
        versions=versions | {"toolkit": toolkit.__version__},
        config={path: _shown(value) for path, value in values.items()},
    )


def _shown(value: Any) -> str:
    """A number, true, false or null as it is; a hash of what may be long, or a secret."""
    text = msgspec.json.encode(value, order="sorted")
    if value is None or isinstance(value, int | float):
        return text.decode()
    return f"{HASH}{hashlib.sha256(text).hexdigest()[:16]}"
