"""`toolkit init`: a first config from answers."""

import sys
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import argument, option
from toolkit.errors import ConfigError

_QUESTIONS = {
    "data": ("Data: files and folders, OWNER/NAME of the hub, or python_stdlib", "python_stdlib"),
    "tokenizer": ("Tokenizer: byte, bpe, gpt2 or dolma2", "bpe"),
    "size": ("Size: parameters such as 10M, or a preset (`toolkit models`)", "2M"),
    "time": ("Time to train: 10m, 2h, 1d", "10m"),
}
"""Option -> question, and the answer of who only presses return."""


def init(
    file: Annotated[
        str, argument("File to write, JSON or YAML by its ending.", metavar="FILE")
    ] = "my.json",
    data: Annotated[
        str | None,
        option(
            "Files and folders with commas, OWNER/NAME of the hub, or python_stdlib.", shown="ask"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, option("byte, bpe (trained on the data), gpt2 or dolma2.", shown="ask")
    ] = None,
    size: Annotated[
        str | None,
        option("A preset, or parameters without embeddings: 10M.", shown="ask", metavar="SIZE"),
    ] = None,
    time: Annotated[
        str | None, option("How long to train: 10m, 2h, 1d.", shown="ask", metavar="TIME")
    ] = None,
    device: Annotated[
        str | None, option("Device to train on, as of `toolkit plan`.", shown="this machine's")
    ] = None,
) -> None:
    """Write a first config: asks for data, tokenizer, size and time, unless options give them.

    Batch size and learning rate follow the size; steps follow the time, as `toolkit plan` expects
    them to take.

    \b
    Examples:
      toolkit init
      toolkit init first.yaml
      toolkit init my.json --data texts/ --tokenizer bpe --size 10M --time 2h
    """
    path = commands.init.first_file(file)
    given = {"data": data, "tokenizer": tokenizer, "size": size, "time": time}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    answers = commands.init.Answers(
        **{name: value or _ask(name, missing) for name, value in given.items()}
    )
    first = commands.init.first_config(answers, device)
    commands.init.write_first(first, path)
    number, batch = first.config.model.shown_parameters, first.config.data_loader.global_batch_size
    typer.echo(
        f"{path}: {number} parameters, {first.steps:,} steps of {batch:,} tokens, about "
        f"{first.seconds / 60:,.0f} min on {first.device} (`toolkit tune {path}` measures)"
    )
    typer.echo(f"next: `toolkit train {path} --dry-run`, then `toolkit train {path}`")


def _ask(name: str, missing: list[str]) -> str:
    question, usual = _QUESTIONS[name]
    try:
        return str(typer.prompt(question, default=usual))
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        given = ", ".join(missing)
        raise ConfigError(f"nobody answers here; give {given} as options") from None
