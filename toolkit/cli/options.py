"""Options that several verbs share, and the words they take."""

from typing import Annotated, Any, Literal, NamedTuple

import typer

from toolkit.distributed.engines import EngineName


class Invocation(NamedTuple):
    """What every verb finds in `context.obj`."""

    words: tuple[str, ...]
    """The command line without --debug."""
    debug: bool


def option(help: str, *names: str, shown: str | bool = True, **more: Any) -> Any:
    """An option; `shown` stands for a default of None in the help."""
    return typer.Option(*names, help=help, show_default=shown, **more)


def argument(help: str, *, metavar: str | None = None, **more: Any) -> Any:
    """A word without a name."""
    return typer.Argument(help=help, metavar=metavar, **more)


Config = Annotated[
    str,
    argument("A recipe (see `toolkit recipes`), a JSON file or a Python file.", metavar="CONFIG"),
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
Processes = Annotated[
    int | None,
    option(
        "Start N processes on this machine: one for each GPU.",
        shown=False,
        metavar="N",
        min=1,
    ),
]
Engine = Annotated[
    EngineName | None,
    option("How processes share the model (train_module.dp_config).", shown=False),
]
NumNodes = Annotated[
    int | None,
    option(
        "Machines of the run; give the same command on each, with --node-rank.",
        "--nodes",
        shown="this one alone",
        metavar="M",
        min=1,
    ),
]
NodeRank = Annotated[
    int | None, option("Number of this machine; 0 is the head.", shown=False, metavar="R", min=0)
]
Head = Annotated[
    str | None,
    option("Where node 0 listens. Default port: 29500.", shown=False, metavar="HOST[:PORT]"),
]
Interface = Annotated[
    str | None,
    option(
        "Network interface of this machine to listen on.",
        shown="the one that has, or reaches, HOST",
        metavar="NAME",
    ),
]
JoinTimeout = Annotated[
    str | None,
    option("How long machines wait for each other.", shown="10m", metavar="TIME"),
]
Root = Annotated[str, option("Folder of all runs (run.root), or URL of one run or several.")]
Registry = Annotated[
    str | None, option("SQLAlchemy URL (run.registry).", shown="ROOT/registry.sqlite")
]
Run = Annotated[
    str, argument("A run: name, id or the first digits of it, or folder.", metavar="RUN")
]
Json = Annotated[bool, option("Everything as one JSON object.", "--json")]
OVERRIDABLE = {"ignore_unknown_options": True}
"""Context settings of verbs that take `--PATH=VALUE`."""
