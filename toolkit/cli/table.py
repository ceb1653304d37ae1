"""Plain aligned tables, the same on a terminal and in a pipe."""

from collections.abc import Collection, Sequence

import typer


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()
) -> None:
    """Print `rows` under `header`; the columns named in `right` are aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    typer.echo(typer.style(line(header), bold=True))
    for row in rows:
        typer.echo(line(row))


def size_text(number: int | None) -> str:
    """Bytes as people read them; "-" where the number is not known."""
    if number is None:
        return "-"
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{number} B"
        size /= 1000
    return f"{size:.4g} TB"
