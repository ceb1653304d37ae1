"""A config from the words of a command line."""

import contextlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.config import is_override
from toolkit.data.corpus_info import (
    datasets_of,
    eval_set_settings,
    eval_sets_of,
    read_corpus,
    source_settings,
)
from toolkit.data.prepare.text.presence import check_presence
from toolkit.distributed.ranks import check_launcher_variables
from toolkit.errors import BadInputError, ConfigError, ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment, load_experiment


def load(
    config: str,
    overrides: Sequence[str] | None,
    base: str | None = None,
    *,
    starts: bool = False,
    environ: Mapping[str, str] | None = os.environ,
    **shorthands: Any,
) -> LoadedExperiment:
    """The experiment that the words of a command line describe; see `load_experiment`."""
    source, flags = split_words(config, overrides, "CONFIG")
    if starts:
        if flags and re.fullmatch(r"[\w.][\w.-]*", flags[0]):
            command = f"toolkit train {source} --name {shlex.join(flags)}"
            raise ConfigError(
                f"unexpected argument {flags[0]!r}; if it is the run's name, type: {command}"
            )
        check_launcher_variables()
    return load_experiment(
        source,
        flags,
        shorthands,
        base=base,
        starts=starts,
        environ=environ,
        check_data=check_data_files,
    )


def split_words(first: str, others: Sequence[str] | None, what: str) -> tuple[str, list[str]]:
    """Part the one positional word, `what`, from overrides on both sides of it."""
    words = [first, *(others or ())]
    position = 0
    while position < len(words):
        word = words[position]
        if not is_override(word):
            return word, [*words[:position], *words[position + 1 :]]
        following = words[position + 1 : position + 2]
        has_value = "=" not in word and following and not is_override(following[0])
        position += 2 if has_value else 1
    raise ConfigError(f"no {what} given; put it before the --PATH=VALUE overrides")


def check_data_files(config: ExperimentConfig) -> None:
    """Check the local files that text which is not prepared yet would come from."""
    found, is_prepared = ErrorList(), False
    with contextlib.suppress(BadInputError):
        is_prepared = read_corpus(config.data) is not None
    for named, settings in ((datasets_of, source_settings), (eval_sets_of, eval_set_settings)):
        for name, dataset in (found.ask(named, config.data) or {}).items():
            with found.collecting(), settings(name):
                check_presence(dataset, is_prepared=is_prepared)
    found.raise_any()
