"""One line for each data set that was made."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.data.tokens.prepared import PreparedDataset


def print_summary(made: "Sequence[PreparedDataset]") -> None:
    """Where each data set is and what it holds."""
    for prepared in made:
        typer.echo(
            f"{prepared.folder}: {count(prepared.num_tokens('train'), 'training token')} in "
            f"{count(prepared.num_documents('train'), 'document')}, "
            f"{count(prepared.num_tokens('val'), 'validation token')} in "
            f"{prepared.num_documents('val'):,}, vocabulary of "
            f"{prepared.vocab_size:,} ({prepared.manifest.dtype})"
        )
