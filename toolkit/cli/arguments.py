"""What several verbs share on the command line."""

import os
from collections.abc import Sequence
from typing import Annotated

import typer

Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A recipe (see `toolkit recipes`) or a JSON file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="--PATH=VALUE", help="Config values by path.", show_default=False),
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder of tokenized data (dataset.root).", show_default=False)
]
WorkDir = Annotated[
    str | None,
    typer.Option(
        help="Local scratch folder for preparing data (run.work_dir).", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Start from this model: a folder of `toolkit convert-hf`, or a run.",
        show_default=False,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(help="Tokens per instance (dataset.sequence_length).", show_default=False),
]


def split_words(first: str, others: Sequence[str] | None, what: str) -> tuple[str, list[str]]:
    """Part the one positional word, `what`, from the overrides that may stand on both sides of it.

    Raises:
        ConfigError: there is none.
    """
    from toolkit.config import is_override
    from toolkit.errors import ConfigError

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


def run_named(text: str) -> str:
    """The folder of the run that `toolkit runs` lists under this name; anything else as it is.

    Raises:
        RunError: several runs have this name.
    """
    from toolkit.runs.registry import find_named

    return find_named(text)


def is_rank_0() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
