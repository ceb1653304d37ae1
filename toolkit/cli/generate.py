"""`toolkit generate`: text, or a conversation."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit import commands
from toolkit.cli.options import AnyModel, ComputeType, Device, TokenizerFolder, option
from toolkit.errors import ConfigError
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.evaluate.continuation import Sampling
    from toolkit.evaluate.prompts import Prompt
    from toolkit.evaluate.text import Generated, Message, TextGenerator

CHAT_WORDS = "/reset starts over, /exit or Ctrl-D ends; Ctrl-C stops an answer"


def generate(
    source: AnyModel,
    prompt: Annotated[str | None, option("Text to continue.", shown="what is piped in")] = None,
    file: Annotated[
        Path | None,
        option(
            'A text on each line; or .jsonl with {"prompt": ...} or {"messages": [...]}.',
            metavar="F",
        ),
    ] = None,
    output: Annotated[
        Path | None, option("With --file: write the texts there.", metavar="F.jsonl")
    ] = None,
    chat: Annotated[bool, option("Talk to the model, by its own chat template.", "--chat")] = False,
    system: Annotated[str | None, option("With --chat: the system prompt.")] = None,
    max_new_tokens: Annotated[int, option("Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float | None,
        option(
            "0 takes the most likely token; above, the higher the more varied.",
            shown="as the model's generation_config.json says; else 0.8",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        option("Draw among the K most likely tokens; 0: all.", shown="likewise; else 50"),
    ] = None,
    top_p: Annotated[
        float | None,
        option(
            "Draw among the likeliest tokens that together reach probability P.",
            shown="likewise; else 1",
        ),
    ] = None,
    seed: Annotated[int, option("The same seed gives the same text.", min=0, max=2**64 - 1)] = 0,
    no_stream: Annotated[bool, option("Show the text when it is complete.", "--no-stream")] = False,
    tokenizer: TokenizerFolder = None,
    device: Device = None,
    dtype: Annotated[
        ComputeType | None, option("Type of the weights.", shown="bf16 on GPUs, else fp32")
    ] = None,
) -> None:
    """Continue text with a model, or chat with it.

    Of a run, the newest checkpoint counts. The text starts as the documents of the model's data do.
    It ends with the model's end token, after --max-new-tokens, or where the context is full.

    \b
    Examples:
      toolkit generate runs/quickstart/first --prompt "def main(" --temperature 0.6
      toolkit generate my-model --chat --system "Answer in one sentence."
      toolkit generate my-model --file questions.jsonl --output answers.jsonl
    """
    given = [name for name, value in (("--prompt", prompt), ("--file", file)) if value is not None]
    given += ["--chat"] if chat else []
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} do not go together; give one of them")
    if system is not None and not chat:
        raise ConfigError("--system goes with --chat; text that is continued has no system prompt")
    if output is not None and file is None:
        raise ConfigError("--output goes with --file; a single text can be piped into a file")
    if output is not None and output.exists():
        raise ConfigError(f"--output: {output}: exists; give another file name")
    prompts = [] if chat else _prompts(prompt, file)
    sampling = commands.generate.sampling(max_new_tokens, temperature, top_k, top_p, seed)
    with commands.generate.open_generator(
        source,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        notify=lambda line: typer.echo(line, err=True),
    ) as generator:
        if chat:
            converse(generator, sampling, system=system, stream=not no_stream)
        elif output is not None:
            _write(generator, prompts, sampling, output)
        else:
            _show(generator, prompts, sampling, stream=not no_stream)


def _prompts(prompt: str | None, file: Path | None) -> "list[Prompt]":
    if file is not None:
        return commands.generate.read_prompts(file)
    if prompt is None:
        text = "" if sys.stdin.isatty() else sys.stdin.read()
        if not text.strip():
            raise ConfigError("no text to continue; give --prompt, --file or --chat, or pipe it in")
        # `echo` ends a line that the model should not have to begin anew.
        prompt = text.removesuffix("\n")
    return [commands.generate.Prompt(prompt=prompt)]


def _show(
    generator: "TextGenerator", prompts: "Sequence[Prompt]", sampling: "Sampling", *, stream: bool
) -> None:
    """To the terminal with the prompts in bold; elsewhere only what was generated."""
    is_terminal = sys.stdout.isatty()
    for number, prompt in enumerate(prompts):
        if number:
            typer.echo()
        head = prompt.prompt if is_terminal else None

        def show(piece: str, head: list[str] = [head] if head else []) -> None:
            if head:
                typer.echo(typer.style(head.pop(), bold=True), nl=False)
            typer.echo(piece, nl=False)

        done = _generate(generator, prompt, sampling, show if stream else None)
        if not stream:
            show(done.text)
        typer.echo()
        if done.stopped == "context":
            total = done.num_prompt_tokens + done.num_new_tokens
            typer.echo(f"stopped: the model's context of {count(total, 'token')} is full", err=True)


def _write(
    generator: "TextGenerator", prompts: "Sequence[Prompt]", sampling: "Sampling", output: Path
) -> None:
    try:
        with output.open("xb") as lines:
            for prompt in prompts:
                done = _generate(generator, prompt, sampling, None)
                lines.write(commands.generate.completed_line(prompt, done))
                lines.flush()  # what is done stays when the rest is interrupted
    except OSError as error:
        raise ConfigError(f"--output: {output}: cannot be written: {error.strerror}") from None
    typer.echo(f"{output}: {count(len(prompts), 'text')}")


def _generate(
    generator: "TextGenerator",
    prompt: "Prompt",
    sampling: "Sampling",
    on_text: Callable[[str], None] | None,
) -> "Generated":
    if prompt.messages is not None:
        return generator.answer(prompt.messages, sampling, on_text)
    return generator.complete(prompt.prompt or "", sampling, on_text)


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

        typer.echo(CHAT_WORDS, err=True)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while (line := _next_line("> " if is_terminal else "")) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            typer.echo(f"{line.split()[0]}: no such command; {CHAT_WORDS}", err=True)
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
    """The answer; None where the conversation is too long for another turn."""
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
    try:
        return input(asking).strip()
    except EOFError:
        if asking:
            typer.echo()
        return None
