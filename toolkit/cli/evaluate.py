"""`toolkit eval`."""

from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.arguments import run_named
from toolkit.cli.choices import ComputeType

if TYPE_CHECKING:
    from toolkit.commands.evaluate import Evaluation, Scores


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A run, a step{N} folder, a Hugging Face folder or hub name."
        ),
    ],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...",
            help="Text to score: .txt, .jsonl (.gz, .zst), .parquet, folders of them, 'globs'.",
            show_default="the run's validation data",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Tokenizer of the text.", show_default="the model's"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per row.", show_default="the run's; else the model's, at most 2048"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from the beginning of a row to that of the next. Less than the row: each "
            "token is scored once, with more of the text before it.",
            show_default="the whole row",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens per forward; changes speed and memory only.",
            show_default="the run's; else 8192",
        ),
    ] = None,
    dtype: Annotated[
        ComputeType | None,
        typer.Option(help="Precision of the computation.", show_default="the run's; else fp32"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on text.

    Of a run, the newest checkpoint counts. Without --files it is scored on the run's own validation
    data, with the numbers that metrics/eval.jsonl has for that step. With --files, documents end
    (and start) as in the run's data, all tokens of a path are one stream of rows, and the last row
    counts however short it is.

    \b
    Examples:
      toolkit eval runs/quickstart/first
      toolkit eval runs/quickstart/first/checkpoints/step200 --files book.txt --stride 128
      toolkit eval HuggingFaceTB/SmolLM2-135M --files a.jsonl 'more/*.parquet' --json
    """
    from toolkit.commands.evaluate import EvalSettings, evaluate
    from toolkit.errors import ConfigError

    if more and not files:
        raise ConfigError(f"{more[0]}: one model at a time; texts go behind --files")
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {batch_tokens}: give a number of tokens, 1 or more")
    found = evaluate(
        run_named(source),
        files=[*(files or ()), *(more or ())],
        settings=EvalSettings(
            sequence_length=sequence_length,
            stride=stride,
            batch_tokens=batch_tokens,
            dtype=dtype.value if dtype is not None else None,
            device=device,
            tokenizer=tokenizer,
            text_field=text_field,
        ),
        notify=lambda line: typer.echo(line, err=True),
    )
    if json:
        _print_json(found)
        return
    _print_table(found)


def _print_table(found: "Evaluation") -> None:
    from toolkit.cli.table import print_table

    step = f", step {found.step}" if found.step is not None else ""
    how = ", ".join(f"{name} {_shown(value)}" for name, value in found.settings.items())
    typer.echo(f"{found.source}{step}: {how}")
    header = ["data", "loss", "ppl", "bits/byte", "targets", "bytes", "seconds"]
    print_table(header, [_row(scores) for scores in found.scores], right=header[1:])


def _row(scores: "Scores") -> list[str]:
    bits = scores.bits_per_byte
    return [
        scores.name,
        f"{scores.loss:.4f}",
        f"{scores.ppl:.4g}" if scores.ppl >= 1e5 else f"{scores.ppl:.3f}",
        "-" if bits is None else f"{bits:.4f}",
        f"{scores.num_targets:,}",
        "-" if scores.num_bytes is None else f"{scores.num_bytes:,}",
        f"{scores.seconds:.1f}",
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else str(value)


def _print_json(found: "Evaluation") -> None:
    import math

    import msgspec

    for scores in found.scores:
        numbers = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in msgspec.structs.asdict(scores).items()
        }
        line = {**numbers, "source": found.source, "step": found.step, "settings": found.settings}
        typer.echo(msgspec.json.encode(line).decode())
