"""`toolkit train` and `toolkit resume`: what is missing is prepared, then the experiment runs."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit.commands.load import check_data_files
from toolkit.data.config import SourceConfig
from toolkit.data.corpus import Corpus, open_corpus
from toolkit.data.corpus_info import (
    CorpusInfo,
    data_places,
    read_corpus,
    with_sources,
    without_sources,
)
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.data.prepare.text.sources import is_gone
from toolkit.distributed.launcher import rank_of
from toolkit.errors import DataError
from toolkit.experiment import run
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.found_data import has_data
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.workers import toolkit_command


def prepare_data(config: ExperimentConfig, *, may_be_gone: bool = False) -> CorpusInfo:
    """Make what is missing; one process of each machine does, the others wait. With `may_be_gone`,
    the text need not be on this machine where the prepared data is."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    # Another machine may have the prepared data alone.
    if may_be_gone or (rank_of(os.environ) > 0 and is_first):
        config = without_gone_sources(config)
    work_dir = config.run.work_dir
    return prepare_corpus(config.data, work_dir=work_dir, progress=is_first, check_text=is_first)


PREPARED = run.DataDoor(prepare=prepare_data, check=check_data_files)
OF_A_RUN = run.DataDoor(
    prepare=functools.partial(prepare_data, may_be_gone=True),
    check=lambda config: check_data_files(without_gone_sources(config)),
)
"""A run moves with its prepared data alone."""


def train(
    config: ExperimentConfig,
    *,
    origins: Mapping[str, str] | None = None,
    stored: ExperimentConfig | None = None,
) -> int:
    """`experiment.run.train`, with data prepared where it is missing; returns the exit code."""
    return run.train(config, origins=origins, stored=stored, data=PREPARED)


def start_workers(
    config: ExperimentConfig, asked: LaunchPlan, words: Sequence[str], *, debug: bool = False
) -> int:
    """Run `toolkit WORDS`, which trains `config`, as the processes that are asked for; returns the
    exit code."""
    return run.start_workers(config, asked, toolkit_command(words, debug=debug))


def resume(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    asked: LaunchPlan | None = None,
    debug: bool = False,
) -> int:
    """`experiment.run.resume`, with data prepared where it is missing; returns the exit code."""
    return run.resume(run_dir, overrides, asked=asked, debug=debug, data=OF_A_RUN)


def without_gone_sources(config: ExperimentConfig) -> ExperimentConfig:
    """`config` that takes prepared data as it is where its text is not on this machine."""
    if not has_data(config) and config.store.permanent_root is None:
        return config
    gone: list[bool] = []

    def look(source: SourceConfig | None) -> SourceConfig | None:
        gone.append(is_gone(source))
        return source

    with_sources(config.dataset, look)
    # All of a mixture: what its own tokenizer was trained on is told by its sources together.
    return config.replace(dataset=without_sources(config.dataset)) if any(gone) else config


def open_run_data(config: ExperimentConfig) -> Corpus:
    """The data of a run (a config of `find_data`) as it is here: nothing is prepared or fetched."""
    config = config.replace(store=config.store.replace(permanent_root=None))
    return open_corpus(config.data, read_run_data(config, in_use=True))


def read_run_data(config: ExperimentConfig, *, in_use: bool = False) -> CorpusInfo:
    """What `read_corpus` tells of a run's data, which must be there."""
    corpus = read_corpus(config.data, in_use=in_use)
    if corpus is None:
        raise DataError(
            f"{', '.join(map(str, data_places(config.data)))}: the run's prepared data is not "
            "there; restore it, or make it again with `toolkit prepare`"
        )
    return corpus
