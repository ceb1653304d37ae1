"""`toolkit data`: making token files by hand, and looking at what is in them."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from toolkit import commands
from toolkit.cli.inspect import inspect
from toolkit.cli.options import (
    OVERRIDABLE,
    Base,
    Config,
    DataRoot,
    Json,
    Overrides,
    SequenceLength,
    WorkDir,
    argument,
    option,
)
from toolkit.cli.printing import (
    LEGEND,
    cell,
    plain_console,
    prepared_text,
    print_json,
    print_pieces,
    print_table,
)
from toolkit.errors import ConfigError
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.commands.mix import MixPreview

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at data, and make token files by hand.",
)
app.command()(inspect)


@app.command(context_settings=OVERRIDABLE)
def mix(
    config: Config,
    overrides: Overrides = None,
    preview: Annotated[bool, option("Prepare nothing; show what is known.", "--preview")] = False,
    json: Json = False,
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
    loaded = commands.load.load(
        *(config, overrides, base),
        data_root=data_root, sequence_length=sequence_length, work_dir=work_dir,
    )  # fmt: skip
    found = commands.mix.preview_mix(loaded.config, prepare=not preview)
    if json:
        print_json(found)
    else:
        _print_sources(found)
    if found.broken_limit is not None:
        raise ConfigError(found.broken_limit)


def _print_sources(found: "MixPreview") -> None:
    share_text = commands.mix.share_text
    rows = [
        [
            source.name,
            share_text(source.shares[0]),
            cell(source.available_tokens, unknown="?") if source.is_prepared else "not prepared",
            cell(source.num_documents, unknown="?"),
            cell(source.taken_tokens, unknown="?"),
            cell(source.repetitions, ".2f", "?"),
            cell(source.max_repetitions, "g", ""),
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


@app.command(context_settings=OVERRIDABLE)
def show(
    config: Config,
    overrides: Overrides = None,
    number: Annotated[int, option("Instances to show.", "-n", "--number", metavar="N")] = 3,
    split: Annotated[Literal["train", "val"], option("Which split.")] = "train",
    start: Annotated[int, option("First instance, from 0.", metavar="I")] = 0,
    source: Annotated[str | None, option("Which source of a mixture.", metavar="NAME")] = None,
    data_root: DataRoot = None,
    sequence_length: SequenceLength = None,
    work_dir: WorkDir = None,
    base: Base = None,
) -> None:
    """Show instances as training sees them: text, documents, and what the loss counts.

    Instances are numbered from 0, before shuffling. Every document starts a new paragraph. Tokens
    between [[ and ]] are targets: the loss asks for them. Control tokens show by their names. Data
    that is not there yet is prepared first.

    \b
    Examples:
      toolkit data show quickstart -n 1
      toolkit data show sft_chat --base models/smollm
      toolkit data show chat.json -n 3 --split val --start 100
      toolkit data show mix.json --source web --dataset.instances='{type: packed}'
    """
    loaded = commands.load.load(
        *(config, overrides, base),
        data_root=data_root, sequence_length=sequence_length, work_dir=work_dir,
    )  # fmt: skip
    found = commands.data.find_instances(
        loaded.config.data, split, source=source, work_dir=loaded.config.run.work_dir
    )
    console = plain_console()
    instances = "instances of unknown number,"
    if found.num_instances is not None:
        instances = count(found.num_instances, "instance")
    console.print(
        f"{found.where} {split}: {instances} of up to "
        f"{found.instances.sequence_length:,} tokens ({found.kind})"
    )
    console.print(LEGEND)
    for shown in found.decoded(start, number):
        documents = len(shown.documents)
        padding = f", {shown.num_padding:,} of padding" if shown.num_padding else ""
        console.print()
        console.print(
            f"instance {shown.instance:,}: {shown.num_tokens:,} tokens{padding}, "
            f"{shown.num_targets:,} targets, {count(documents, 'document')}",
            style="bold",
        )
        print_pieces(console, shown.text, shown.documents)


@app.command()
def tokenize(
    paths: Annotated[list[str], argument("Text files, folders or globs.", metavar="PATHS...")],
    out: Annotated[str, option("The data set to make.", metavar="FOLDER")],
    tokenizer: Annotated[
        str,
        option(
            "byte, bpe:SIZE (trained on the text), a folder, tokenizer.json, *.tiktoken, "
            "*.model, or a name on the hub.",
            metavar="TOKENIZER",
        ),
    ] = "byte",
    text_field: Annotated[
        str, option("Column or key that holds the text.", metavar="NAME")
    ] = "text",
    encoding_errors: Annotated[
        str,
        option(
            "Bytes that are not UTF-8: strict (stop), or replace (with U+FFFD; counted).",
            metavar="HOW",
        ),
    ] = "strict",
    validation_fraction: Annotated[
        float, option("Share of documents held out.", metavar="F")
    ] = 0.05,
    processes: Annotated[int | None, option("Processes.", shown="all cores", metavar="N")] = None,
    deduplicate: Annotated[
        bool, option("Leave out documents that were there before.", "--deduplicate")
    ] = False,
) -> None:
    """Turn text files into token files, without a config.

    Reads .txt, .jsonl (plain, .gz, .zst), .parquet and .arrow. What was interrupted goes on where
    it stopped. For anything more (filters, templates, instruction data) write a config and use
    `toolkit prepare`. To train on the result, give its place with source null.

    \b
    Examples:
      toolkit data tokenize texts/ --out data/texts/byte
      toolkit data tokenize 'wiki/*.jsonl.zst' --out data/wiki/bpe --tokenizer bpe:32000
      toolkit train my.json --dataset.source=null --data-root data \\
          --dataset.dataset_name=wiki --dataset.dataset_config=bpe
    """
    made = commands.data.tokenize(
        paths,
        out,
        tokenizer=tokenizer,
        text_field=text_field,
        encoding_errors=encoding_errors,
        validation_fraction=validation_fraction,
        num_processes=processes,
        deduplicate=deduplicate,
    )
    typer.echo(prepared_text(made, documents=True))


@app.command()
def merge(
    folders: Annotated[
        list[str], argument("Prepared data sets, two or more.", metavar="FOLDERS...")
    ],
    out: Annotated[str, option("The data set to make.", metavar="FOLDER")],
) -> None:
    """Join prepared data sets into one, their documents in the order of FOLDERS.

    They must have the same tokenizer and the same policy for the tokens that start and end
    documents; what differs is named. To draw from several data sets in given shares, use a mix
    (`toolkit data mix`) in place of merging.

    \b
    Examples:
      toolkit data merge data/wiki/bpe data/books/bpe --out data/both/bpe
      toolkit data merge data/day*/byte --out data/week/byte
    """
    typer.echo(prepared_text(commands.data.merge(folders, out), documents=True))


@app.command()
def split(
    folder: Annotated[str, argument("A prepared data set.", metavar="FOLDER")],
    out: Annotated[str, option("The data set (or folder of parts) to make.", metavar="FOLDER")],
    validation_fraction: Annotated[
        float | None, option("Hold out this share of all documents anew.", metavar="F")
    ] = None,
    parts: Annotated[
        int | None, option("Cut into N data sets of about equal tokens.", metavar="N")
    ] = None,
) -> None:
    """Cut a prepared data set anew: another validation share, or several parts.

    Documents stay whole. The held-out ones are chosen by a hash of their number (train's first,
    then val's): the same every time, and more of the same with a larger share. Parts keep the
    order of documents and are called part-0, part-1, ...

    \b
    Examples:
      toolkit data split data/wiki/bpe --validation-fraction 0.01 --out data/wiki/bpe-1
      toolkit data split data/wiki/bpe --parts 4 --out data/wiki-parts
    """
    for made in commands.data.split(folder, out, validation_fraction, parts):
        typer.echo(prepared_text(made, documents=True))
