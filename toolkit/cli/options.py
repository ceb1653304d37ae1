"""Options that several verbs share, and the words they take."""

from typing import Annotated, Literal

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
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A run, a step{N} folder, a Hugging Face folder or hub name."
    ),
]
TokenizerFolder = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Tokenizer.", show_default="the model's")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one")
]
ComputeType = Literal["fp32", "bf16"]
Json = Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")]
OVERRIDABLE = {"ignore_unknown_options": True}
"""Context settings of verbs that take `--PATH=VALUE`."""
