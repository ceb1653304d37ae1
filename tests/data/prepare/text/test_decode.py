import random
import sys
from types import FrameType
from typing import Any

from toolkit.data.prepare.text.reading import Counts, decode


def error_by_error(data: bytes) -> tuple[str, int]:
    """The same, slowly: one replacement character for what each error names."""
    text, replaced = "", 0
    while True:
        try:
            return text + data.decode(), replaced
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + "\ufffd"
            replaced += error.end - error.start
            data = data[error.end :]


def test_every_error_becomes_one_character_and_its_bytes_are_counted() -> None:
    draw = random.Random(0)
    parts = [b"a", "é".encode(), "中".encode(), "\U0001f600".encode(), "\ufffd".encode()]
    parts += [b"\xff", b"\xf0\x9f", b"\xe4\xb8", b"\xef\xbf", b"\xed\xa0\x80", b"\x80", b"\xef"]
    for _ in range(2000):
        data = b"".join(draw.choices(parts, k=12))
        counts = Counts()
        assert (decode(data, "", 0, "replace", counts), counts.replaced_bytes) == error_by_error(
            data
        )


def test_work_does_not_grow_with_the_number_of_errors() -> None:
    data = b"caf\xe9 " * 2000
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        return trace

    counts, before = Counts(), sys.gettrace()
    sys.settrace(trace)
    try:
        text = decode(data, "", 0, "replace", counts)
    finally:
        sys.settrace(before)
    assert text == "caf\ufffd " * 2000
    assert counts.replaced_bytes == 2000
    assert steps < 100
