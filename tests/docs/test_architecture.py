"""docs/architecture.md names files and folders that are there, and every room has its line."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()


def test_every_file_it_names_is_there() -> None:
    words = re.findall(r"`([\w/.]+?(?:\.py|/))`", PAGE)
    missing = [
        word
        for word in words
        if not any((ROOT / top / word).exists() for top in (".", "toolkit"))
        and not list((ROOT / "toolkit").rglob(word.strip("/")))
    ]
    assert len(words) > 60
    assert missing == []


def test_every_room_is_on_it() -> None:
    rooms = [path.parent.name for path in (ROOT / "toolkit").glob("*/__init__.py")]
    assert len(rooms) > 10
    assert [room for room in rooms if f"{room}/" not in PAGE] == []
