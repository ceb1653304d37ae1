"""`toolkit data split`."""

from typing import Annotated

import typer


def split(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A prepared data set.")],
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="The data set (or folder of parts) to make.")
    ],
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="Hold out this share of all documents anew.", show_default=False
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Cut into N data sets of about equal tokens.", show_default=False
        ),
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
    from toolkit.cli.data.summary import print_summary
    from toolkit.config.paths import local_path
    from toolkit.data.prepare.tools.rewrite import split_parts, split_validation
    from toolkit.errors import ConfigError

    out = str(local_path(out, "--out"))
    if validation_fraction is not None and parts is None:
        print_summary([split_validation(folder, out, validation_fraction)])
    elif parts is not None and validation_fraction is None:
        print_summary(split_parts(folder, out, parts))
    else:
        raise ConfigError("give either --validation-fraction F or --parts N")
