"""Instances as text on a terminal: documents, and what of them the loss counts.

The marks are the same with and without colours, so that text in a pipe tells as much.
"""

import errno
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from toolkit.data.instances.base import DecodedPiece, DocumentPart

TARGET = ("[[", "]]")
"""Around tokens that the loss asks for, on every kind of terminal, as errors have them."""
LEGEND = "[[ ]]: targets, the tokens that the loss asks for"
DOCUMENT_COLORS = ("cyan", "magenta")


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
            console.print(Text(f"  document {document:,}, tokens {tokens}", style=next(colors)))
        text = visible(piece.text)
        if piece.is_target:
            line.append(f"{TARGET[0]}{text}{TARGET[1]}", style="green")
        else:
            line.append(text, style="dim")
    _print_indented(console, line)


def visible(text: str) -> str:
    """Control characters as their names: what was read from files must not steer the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def _print_indented(console: "Console", text: "Text") -> None:
    if text:
        for line in text.split("\n", allow_blank=True):
            line.pad_left(4)
            console.print(line)
