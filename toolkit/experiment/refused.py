"""What else is wrong with a config that is refused: all that can be told without the values which
are refused, so that a user mends everything at once."""

import os
import re

from toolkit.config.interpolation import fill
from toolkit.distributed.launcher import world_size_of
from toolkit.errors import ErrorList
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.preflight import check_data_files, check_load_path
from toolkit.runs.registry import check_run_folder, resolve_run_folder


def add_other_errors(
    found: ErrorList,
    config: ExperimentConfig,
    *,
    has_model: bool = True,
    across: bool = True,
    has_files: bool = True,
    starts: bool = False,
) -> None:
    """Add to `found`, the reasons to refuse a config, what is wrong with the rest of it.

    Args:
        config: what could be built, with defaults in the place of what is refused.
        has_model: its model is the one that is meant.
        across: its sections belong together.
        has_files: its files must be there.
        starts: it would start a run.
    """
    refused = [about for about in (getattr(e, "about", "") for e in found.errors) if about]
    names_known = not any(a.startswith(("model", "train_module.lora")) for a in refused)
    others = ErrorList()
    if across:
        with others.collecting():
            check_experiment(
                config, world_size_of(os.environ), has_model=has_model, has_names=names_known
            )
    if has_files:
        with others.collecting():
            filled = fill(config)
            with others.collecting():
                check_data_files(filled)
            if starts:
                with others.collecting():
                    check_run_folder(filled.run, "<time>")
            if starts and across:
                folder = resolve_run_folder(filled.run, "<time>")
                with others.collecting():
                    check_load_path(filled, folder, has_model=names_known)
    # What is said of a value that was refused is said of its default here.
    names = [re.escape(about.rpartition(".")[2]) for about in refused if about != "model"]
    spoken_of = re.compile(rf"\b({'|'.join(names)})\b") if names else None
    for other in others.errors:
        if spoken_of is None or not spoken_of.search(str(other)):
            found.add(other)
