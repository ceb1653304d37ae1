"""What several verbs print: tables, JSON, and instances as text.

Everything is the same on a terminal and in a pipe, colours and the width of prose aside.
"""

import errno
import itertools
import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import typer

from toolkit.wording import count, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from toolkit.data.instances.base import DocumentPart
    from toolkit.data.prepare.tools.show import DecodedPiece
    from toolkit.data.tokens.prepared import PreparedDataset

TARGET = ("[[", "]]")
"""Around tokens that the loss asks for, on every kind of terminal, as errors have them."""
LEGEND = "[[ ]]: targets, the tokens that the loss asks for"
_NARROWEST = 60
"""Columns of prose, below which it goes under its row: the longest words have as many."""
DOCUMENT_COLORS = ("cyan", "magenta")


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    ends_in_prose: bool = False,
) -> None:
    """`ends_in_prose`: the last column is wrapped at the width of the terminal; where it has no
    room beside the others, each row is a paragraph."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    width = _terminal_width() if ends_in_prose else 0
    room = width - sum(widths[:-1]) - 2 * len(widths[:-1])
    if width and room < min(_NARROWEST, widths[-1]):
        for name, *facts, prose in rows:
            pairs = zip(header[1:-1], facts, strict=True)
            told = ", ".join(f"{key} {fact}" for key, fact in pairs if fact != "-")
            typer.echo(typer.style(name, bold=True))
            for text in (told, prose):
                print_prose(text, indent="    ")
        return
    typer.echo(typer.style(line(header), bold=True))
    for *cells, last in rows:
        parts = textwrap.wrap(last, room, break_on_hyphens=False) if width else [last]
        typer.echo(line([*cells, *(parts[:1] or [""])]))
        for part in parts[1:]:
            typer.echo(line([*("" for _ in cells), part]))


def print_prose(text: str, *, indent: str = "") -> None:
    """A paragraph, wrapped at the width of the terminal; in a pipe, one line."""
    if width := _terminal_width():
        text = textwrap.fill(
            text,
            max(width, _NARROWEST),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    else:
        text = indent + text
    typer.echo(text)


def _terminal_width() -> int:
    """In columns, COLUMNS before what the terminal says; 0 in a pipe without it: endless."""
    return shutil.get_terminal_size((0, 0)).columns


def cell(value: str | float | None, digits: str = ",", unknown: str = "-") -> str:
    """A number in `digits` (a format), text as it is, `unknown` for None."""
    if value is None:
        return unknown
    return value if isinstance(value, str) else f"{value:{digits}}"


def print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def prepared_text(prepared: "PreparedDataset", *, documents: bool = False) -> str:
    """Where a data set is and what it holds, in a line."""
    train, val = (prepared.num_documents(split) for split in ("train", "val"))
    of_train, of_val = (
        (f" in {count(train, 'document')}", f" in {val:,}") if documents else ("", "")
    )
    return (
        f"{prepared.folder}: {count(prepared.num_tokens('train'), 'training token')}{of_train}, "
        f"{count(prepared.num_tokens('val'), 'validation token')}{of_val}, "
        f"vocabulary of {prepared.vocab_size:,} ({prepared.manifest.dtype})"
    )


def plain_console() -> "Console":
    """A console that neither wraps nor colours text of its own accord."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            # rich's own puts /dev/null in the pipe's place: nobody could tell any more that the
            # reader left.
            raise BrokenPipeError(errno.EPIPE, "nobody reads on")

    return Plain(highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_pieces(
    console: "Console", pieces: "Sequence[DecodedPiece]", documents: "Sequence[DocumentPart]"
) -> None:
    """Print the text of one instance; every document starts a new paragraph with its number."""
    from rich.text import Text

    ranges = {part.document: part for part in documents}
    document: int | None = -1
    line, colors = Text(), itertools.cycle(DOCUMENT_COLORS)
    for piece in pieces:
        if piece.document != document:
            _print_indented(console, line)
            document, line = piece.document, Text()
            if document is None:
                console.print(Text(f"  padding, {piece.num_tokens:,} tokens", style="dim"))
                return
            part = ranges[document]
            tokens = f"{part.start:,} to {part.end - 1:,} of {part.num_tokens:,}"
            name = f"document {document:,}"
            if isinstance(piece.side, str):
                name = f"{piece.side} ({name})"
            console.print(Text(f"  {name}, tokens {tokens}", style=next(colors)))
        text = visible(piece.text, kept="\n\t")
        if piece.is_target:
            line.append(f"{TARGET[0]}{text}{TARGET[1]}", style="green")
        else:
            line.append(text, style="dim")
    _print_indented(console, line)


def _print_indented(console: "Console", text: "Text") -> None:
    if text:
        for line in text.split("\n", allow_blank=True):
            line.pad_left(4)
            console.print(line)
