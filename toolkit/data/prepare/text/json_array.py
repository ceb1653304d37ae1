"""A list of objects in a .json file: one document an object."""

import json
from collections.abc import Iterator

from toolkit.data.prepare.text.jsonl import ObjectReader, too_deep
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.plain import BYTE_ORDER_MARK
from toolkit.data.prepare.text.reading import Counts, Reading, decode
from toolkit.data.prepare.text.shards import Range
from toolkit.errors import DataError

_SPACE = " \t\r\n"


def read_json_array(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the objects in the list that the file of `part` holds.

    Raises:
        DataError: it is no such list; names the element.
    """
    with open(part.path, "rb") as file:
        data = file.read().removeprefix(BYTE_ORDER_MARK)
    errors = getattr(reading.source, "encoding_errors", "strict")
    text = decode(data, part.path, 0, errors, counts)
    del data
    objects, decoder = ObjectReader(part, reading, counts), json.JSONDecoder()
    position, number = _next(text, _next(text, 0) + 1), 0
    while text[position : position + 1] != "]":

        def where(number: int = number) -> str:
            return f"{part.path}: element {number}"

        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecursionError):
                raise too_deep(where()) from None
            raise DataError(f"{where()}: not valid JSON: {error}") from None
        element = text[position:end].encode("utf-8", "surrogatepass")
        yield objects.piece(element, 0, f"{part.name}:{number}", where(), where)
        number += 1
        position = _next(text, end)
        if text[position : position + 1] == ",":
            position = _next(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{where()}: no comma or ] follows it; repair the file")
    rest = _next(text, position + 1)
    if rest < len(text):
        raise DataError(f"{part.path}: text follows the list ({text[rest : rest + 20]!r})")


def _next(text: str, position: int) -> int:
    """The first place from `position` on that is no white space."""
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
