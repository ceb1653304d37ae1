"""Options that several verbs share, and the words they take."""

from typing import Annotated, Any, Literal

import typer


def option(help: str, *names: str, shown: str | bool = True, **more: Any) -> Any:
    """An option; `shown` stands for a default of None in the help."""
    return typer.Option(*names, help=help, show_default=shown, **more)


def argument(help: str, *, metavar: str | None = None, **more: Any) -> Any:
    """A word without a name."""
    return typer.Argument(help=help, metavar=metavar, **more)


Config = Annotated[
    str, argument("A recipe (see `toolkit recipes`) or a JSON file.", metavar="CONFIG")
]
Overrides = Annotated[list[str] | None, argument("Config values by path.", metavar="--PATH=VALUE")]
DataRoot = Annotated[str | None, option("Folder of tokenized data (dataset.root).")]
WorkDir = Annotated[str | None, option("Local folder for unfinished data, and for a run at a URL.")]
Base = Annotated[
    str | None,
    option("Start from this model: a folder of `toolkit convert-hf`, or a run.", metavar="FOLDER"),
]
SequenceLength = Annotated[int | None, option("Tokens per instance (dataset.sequence_length).")]
AnyModel = Annotated[
    str, argument("A run, a step{N} folder, a Hugging Face folder or hub name.", metavar="SRC")
]
Averages = Annotated[
    str | None,
    option(
        "Averages of the weights instead of them: ema, or ema/0.999 where there are several.",
        shown="the weights",
        metavar="NAME",
    ),
]
TokenizerFolder = Annotated[str | None, option("Tokenizer.", shown="the model's", metavar="FOLDER")]
Device = Annotated[str | None, option("cpu, cuda, cuda:1, ...", shown="a GPU if there is one")]
ComputeType = Literal["fp32", "bf16"]
Json = Annotated[bool, option("Everything as one JSON object.", "--json")]
OVERRIDABLE = {"ignore_unknown_options": True}
"""Context settings of verbs that take `--PATH=VALUE`."""
