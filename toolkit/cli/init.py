"""`toolkit init`: a first config from answers."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import argument, option
from toolkit.errors import ConfigError
from toolkit.wording import compact

_QUESTIONS = {
    "data": ("Data: files and folders, OWNER/NAME of the hub, or python_stdlib", "python_stdlib"),
    "tokenizer": ("Tokenizer: byte, bpe, gpt2 or dolma2", "bpe"),
    "size": ("Size: parameters in all, such as 10M, or a preset (`toolkit models`)", "2M"),
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
        option(
            "A preset, or parameters, those of the output head too: 10M.",
            shown="ask",
            metavar="SIZE",
        ),
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
    _tell(path, first)


def _tell(path: Path, first: "commands.init.First") -> None:
    config, model = first.config, first.config.model.to_transformer()
    batch, optim = config.data_loader.global_batch_size, config.train_module.optim
    kind = optim.to_dict()["type"]
    typer.echo(
        f"{path}: {model.shown_parameters} parameters ({model.num_layers} layers of "
        f"{model.d_model}), rows of {config.dataset.sequence_length} tokens, {kind} with lr "
        f"{optim.lr:g}"
    )
    typer.echo(
        f"{first.steps:,} steps of {batch:,} tokens, about {first.seconds / 60:,.0f} min on "
        f"{first.device} (`toolkit tune {path}` measures)"
    )
    if first.tokens is not None:
        typer.echo(f"the data has about {compact(first.tokens)} tokens: {first.epochs:.1f} epochs")
    if first.is_repetitive:
        typer.echo(
            "note: text that is read more than about 4 times teaches less each time; give more of "
            "it, or a shorter time"
        )
    typer.echo(f"next: `toolkit train {path} --dry-run`, then `toolkit train {path}`")


def _ask(name: str, missing: list[str]) -> str:
    """An answer that can be used; asks again after one that cannot."""
    question, usual = _QUESTIONS[name]
    while True:
        try:
            answer = str(typer.prompt(question, default=usual)).strip()
            answer = answer.lower() if name == "tokenizer" else answer
            commands.init.check_answer(name, answer)
        except ConfigError as error:
            if not sys.stdin.isatty():
                raise
            typer.echo(error.problem.removeprefix(f"--{name} "))
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            typer.echo()
            given = ", ".join(missing)
            raise ConfigError(f"nobody answers here; give {given} as options") from None
        else:
            return answer
