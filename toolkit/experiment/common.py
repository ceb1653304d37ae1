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
from toolkit.launch.messages import Common
from toolkit.runs.environment import installed_version


def common_content(config: ExperimentConfig) -> dict[str, Any]:
    """The config without what may differ: folders, and text that is known by its tokens."""
    content = config.to_dict()
    for name in ("description", "run", "dataset", "store"):
        del content[name]
    return {**content, "sequence_length": config.dataset.sequence_length}


def common_of(config: ExperimentConfig) -> Common:
    """Versions of libraries, hashes of the config's values by path, and the name of the run."""
    versions = {name: installed_version(name) for name in VERSIONED}
    values = dict(leaves(common_content(config))) | {"--engine": os.environ.get(ENGINE)}
    encoded = {path: msgspec.json.encode(value, order="sorted") for path, value in values.items()}
    run = config.run
    names = [run.experiment, *([] if run.name is None else [run.name])]
    return Common(
        run="/".join(names) if run.save_folder is None else Path(run.save_folder).name,
        versions=versions | {"toolkit": toolkit.__version__},
        config={path: hashlib.sha256(text).hexdigest()[:16] for path, text in encoded.items()},
    )
