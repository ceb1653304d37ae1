"""`toolkit data mix`."""

from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.arguments import (
    Base,
    Config,
    DataRoot,
    Overrides,
    SequenceLength,
    WorkDir,
    split_words,
)
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.commands.mix import MixPreview


def mix(
    config: Config,
    overrides: Overrides = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Prepare nothing; show what is known.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    data_root: DataRoot = None,
    sequence_length: SequenceLength = None,
    work_dir: WorkDir = None,
    base: Base = None,
) -> None:
    """Show what a run takes of each source of its mixture: shares, tokens, documents, repetitions.

    Sources that are not there yet are prepared first; with --preview they are shown without
    numbers. Ends with an error where a source would be repeated more than its max_repetitions.

    \b
    Examples:
      toolkit data mix my.json --preview
      toolkit data mix my.json --preview --dataset.mix.sources.code.ratio=0.3
      toolkit data mix my.json --trainer.max_duration='{value: 2e9, unit: tokens}'
    """
    from toolkit.commands.mix import preview_mix
    from toolkit.errors import ConfigError
    from toolkit.experiment.load import load_experiment

    source, paths = split_words(config, overrides, "CONFIG")
    shorthands = {
        "data_root": data_root, "sequence_length": sequence_length, "work_dir": work_dir,
    }  # fmt: skip
    loaded = load_experiment(source, paths, shorthands, base=base).config
    found = preview_mix(loaded, prepare=not preview)
    if json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        _print_sources(found)
    if found.broken_limit is not None:
        raise ConfigError(found.broken_limit)


def _print_sources(found: "MixPreview") -> None:
    from toolkit.cli.table import print_table
    from toolkit.commands.mix import share_text

    rows = [
        [
            source.name,
            share_text(source.shares[0]),
            _number(source.available_tokens) if source.is_prepared else "not prepared",
            _number(source.num_documents),
            _number(source.taken_tokens),
            "?" if source.repetitions is None else f"{source.repetitions:.2f}",
            "" if source.max_repetitions is None else f"{source.max_repetitions:g}",
        ]
        for source in found.sources
    ]
    header = ["source", "share", "tokens", "documents", "tokens in run", "epochs", "limit"]
    print_table(header, rows, right=header[1:])
    if found.total_tokens is None:
        typer.echo("the run's length is known once all sources are prepared")
    else:
        typer.echo(f"{count(found.total_tokens, 'token')} in the run")
    if len(found.segment_starts) > 1:
        typer.echo()
        header = ["source", *(f"from {start:,}" for start in found.segment_starts)]
        shares = [[s.name, *(share_text(share) for share in s.shares)] for s in found.sources]
        print_table(header, shares, right=header[1:])


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
