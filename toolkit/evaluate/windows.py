"""From a stream of tokens to rows: every token scored once, with the left context there is.

Windows of `sequence_length` tokens begin every `stride` tokens. A window scores the tokens that the
one before did not reach; those before them are context. With a stride as long as the window nothing
overlaps: plain rows, whose first token nothing predicts. The last window ends with the stream,
however short it is.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from toolkit.data.instances.base import Rows
from toolkit.evaluate.documents import Chunk


class Window(NamedTuple):
    """One row."""

    ids: np.ndarray
    """`(num_tokens,)`."""
    documents: np.ndarray
    """Number of each token's document, ascending, `(num_tokens,)`."""
    num_context: int
    """Tokens from the first that are not scored; 0: all are, but the first has no context."""


def windows(chunks: Iterable[Chunk], *, sequence_length: int, stride: int) -> Iterator[Window]:
    """The windows of a stream; memory holds one chunk and one window.

    Args:
        stride: tokens between the beginnings of two windows, from 1 to `sequence_length`.
    """
    ids, documents = np.zeros(0, np.int64), np.zeros(0, np.int64)
    num_documents = context = 0
    for chunk in chunks:
        numbers = num_documents + np.cumsum(chunk.is_start)
        num_documents = int(numbers[-1]) if len(numbers) else num_documents
        ids = np.concatenate([ids, chunk.ids])
        documents = np.concatenate([documents, numbers])
        begin = 0
        # Not the last window: more tokens follow it.
        while len(ids) - begin > sequence_length:
            end = begin + sequence_length
            yield Window(ids[begin:end], documents[begin:end], context)
            begin, context = begin + stride, sequence_length - stride
        ids, documents = ids[begin:], documents[begin:]
    if len(ids):
        yield Window(ids, documents, context)


def stack_windows(group: list[Window], *, mask_documents: bool) -> Rows:
    """Windows as the rows of one batch, filled up on the right, where causal attention makes that
    nobody's context.

    Args:
        mask_documents: keep documents from seeing each other.
    """
    shape = (len(group), max(len(window.ids) for window in group))
    ids, is_target = np.zeros(shape, np.int64), np.zeros(shape, bool)
    documents = np.zeros(shape, np.int32)
    for row, window in enumerate(group):
        length = len(window.ids)
        ids[row, :length] = window.ids
        is_target[row, window.num_context : length] = True
        numbers = window.documents - window.documents[0]
        documents[row, :length] = numbers
        documents[row, length:] = numbers[-1] + 1
    rows: Rows = {"input_ids": ids, "label_mask": is_target}
    return {**rows, "document_ids": documents} if mask_documents else rows
