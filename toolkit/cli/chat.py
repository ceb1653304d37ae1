"""The conversation of `toolkit generate --chat`."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from toolkit.evaluate.continuation import Sampling
    from toolkit.evaluate.text import Message, TextGenerator

COMMANDS = "/reset starts over, /exit or Ctrl-D ends; Ctrl-C stops an answer"


def converse(
    generator: "TextGenerator", sampling: "Sampling", *, system: str | None, stream: bool
) -> None:
    """Answer line after line until /exit or the end of the input.

    On a terminal it asks with "> "; elsewhere every line is a turn, and only answers are written.
    """
    generator.check_chat()
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401 (gives `input` a history and keys to edit a line)

        typer.echo(COMMANDS, err=True)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while (line := _next_line("> " if is_terminal else "")) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            typer.echo(f"{line.split()[0]}: no such command; {COMMANDS}", err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(generator, messages, sampling, stream=stream)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(
    generator: "TextGenerator", messages: "list[Message]", sampling: "Sampling", *, stream: bool
) -> str | None:
    """The text that was shown; None where the conversation is too long for another turn."""
    from toolkit.errors import ConfigError

    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        typer.echo(piece, nl=False)

    on_text: Callable[[str], None] | None = show if stream else None
    try:
        done = generator.answer(messages, sampling, on_text)
    except KeyboardInterrupt:
        typer.echo()
        return "".join(shown)
    except ConfigError as error:
        typer.echo(f"{error}; /reset starts over", err=True)
        return None
    typer.echo() if stream else typer.echo(done.text)
    if done.stopped == "context":
        typer.echo("the context is full; /reset starts over", err=True)
    return done.text


def _next_line(asking: str) -> str | None:
    """What was typed; None at the end of the input."""
    try:
        return input(asking).strip()
    except EOFError:
        if asking:
            typer.echo()
        return None
