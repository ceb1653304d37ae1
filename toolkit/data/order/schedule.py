"""Batch sizes and row lengths that change during training, as functions of the tokens seen.

A change takes effect at the first batch that begins at or after its point. Shorter rows are whole
instances of `dataset.sequence_length` tokens, cut into equal parts: batch n holds the same tokens
whatever the lengths are.
"""

import itertools
from collections.abc import Sequence

from toolkit.config import Config
from toolkit.data.order.plan import Phase


class BatchSizeChangeConfig(Config, kw_only=True):
    """A batch size from a point of training on."""

    tokens: int
    """Tokens trained on when it begins; 0: from the start, in place of `global_batch_size`."""
    global_batch_size: int | None = None
    """Tokens per optimizer step from there on; null: twice as many as before."""


class SequenceLengthChangeConfig(Config, kw_only=True):
    """A row length from a point of training on."""

    tokens: int
    """Tokens trained on when it begins."""
    sequence_length: int | None = None
    """Tokens of a row from there on, a divisor of `dataset.sequence_length`; null: twice as many as
    before."""


Change = BatchSizeChangeConfig | SequenceLengthChangeConfig
Values = list[tuple[int, int]]
"""(tokens, value from there on); the first begins at 0."""


def check_changes(name: str, changes: Sequence[Change], value: str) -> list[str]:
    """What is wrong with the schedule `name` of the setting `value`, in lines that begin with the
    field."""
    lines = []
    places = [change.tokens for change in changes]
    for number, change in enumerate(changes):
        given = getattr(change, value)
        if change.tokens < 0:
            lines.append(f"{name}.{number}.tokens must not be negative: {change.tokens}")
        if given is not None and given <= 0:
            lines.append(f"{name}.{number}.{value} must be greater than 0, not {given}")
        if given is None and change.tokens == 0:
            lines.append(f"{name}.{number}.{value}: needed at tokens 0; nothing is before it")
    for number, (before, after) in enumerate(itertools.pairwise(places), 1):
        if after <= before:
            lines.append(
                f"{name}.{number}.tokens is {after:,}, after {before:,}: changes follow each "
                f"other; use more than {before:,}"
            )
    return lines


def values_of(changes: Sequence[Change], value: str, first: int) -> Values:
    """The value of each stretch of training; `first` is that before any change."""
    found = [(0, first)]
    for change in changes:
        asked = getattr(change, value) or 2 * found[-1][1]
        if change.tokens == 0:
            found = []
        found.append((change.tokens, asked))
    return found


def phases_of(batch_sizes: Values, lengths: Values, sequence_length: int) -> list[Phase]:
    """Both schedules as one, in instances of `sequence_length` tokens."""
    points = sorted({tokens for tokens, _ in (*batch_sizes, *lengths)})

    def at(values: Values, point: int) -> int:
        return next(value for tokens, value in reversed(values) if tokens <= point)

    return [
        Phase(
            -(-point // sequence_length),
            max(1, at(batch_sizes, point) // sequence_length),
            max(1, sequence_length // at(lengths, point)),
        )
        for point in points
    ]
