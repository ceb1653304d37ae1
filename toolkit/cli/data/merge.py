"""`toolkit data merge`."""

from typing import Annotated

import typer


def merge(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDERS...", help="Prepared data sets, two or more.")
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The data set to make.")],
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
    from toolkit.cli.data.summary import print_summary
    from toolkit.config.paths import local_path
    from toolkit.data.prepare.tools.rewrite import merge_datasets

    print_summary([merge_datasets(folders, str(local_path(out, "--out")))])
