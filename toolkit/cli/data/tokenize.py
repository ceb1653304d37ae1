"""`toolkit data tokenize`."""

from typing import Annotated

import typer


def tokenize(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATHS...", help="Text files, folders or globs.")
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The data set to make.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="TOKENIZER",
            help="byte, bpe:SIZE (trained on the text), a folder, tokenizer.json, *.tiktoken, "
            "*.model, or a name on the hub.",
        ),
    ] = "byte",
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="Column or key that holds the text.")
    ] = "text",
    encoding_errors: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Bytes that are not UTF-8: strict (stop), or replace (with U+FFFD; counted).",
        ),
    ] = "strict",
    validation_fraction: Annotated[
        float, typer.Option(metavar="F", help="Share of documents held out.")
    ] = 0.05,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Processes.", show_default="all cores")
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Leave out documents that were there before.")
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
    from toolkit.config.paths import local_path
    from toolkit.data.prepare.build.tokenize import tokenize_files

    prepared = tokenize_files(
        paths,
        str(local_path(out, "--out")),
        tokenizer=tokenizer,
        text_field=text_field,
        encoding_errors=encoding_errors,
        validation_fraction=validation_fraction,
        num_processes=processes,
        deduplicate=deduplicate,
    )
    from toolkit.cli.data.summary import print_summary

    print_summary([prepared])
