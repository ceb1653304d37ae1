"""What people say about a run: tags and a note, in metadata/notes.json."""

import re
from collections.abc import Collection
from pathlib import Path

import msgspec

from toolkit.errors import ConfigError, RunError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import read_json

_TAG = re.compile(r"[^\s,+\-][^\s,]{0,63}\Z")
MOST_CHARACTERS = 1_000
"""Of a note, and of all tags with commas between them: the registry has no room for more."""


class Notes(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Content of metadata/notes.json."""

    tags: list[str] = []
    """In alphabetical order."""
    note: str = ""


def read_notes(folder: Path) -> Notes:
    """The notes of a run; empty where there are none, or they cannot be read."""
    try:
        return read_json(folder / RUN_FILES.notes, RunError, Notes)
    except (FileNotFoundError, RunError):
        return Notes()


def check_tag(tag: str) -> None:
    """Raise ConfigError where `tag` cannot be one."""
    if not _TAG.match(tag) or not tag.isprintable():
        raise ConfigError(
            f"{tag!r} cannot be a tag: write up to 64 characters without spaces and commas that "
            "do not begin with + or -"
        )


def change_tags(folder: Path, add: Collection[str], remove: Collection[str]) -> Notes:
    """Add and remove tags; what there is then. Removing one that is not there is no error."""
    for tag in add:
        check_tag(tag)
    notes = read_notes(folder)
    notes.tags = sorted({*notes.tags, *add} - {*remove})
    if len(",".join(notes.tags)) > MOST_CHARACTERS:
        raise ConfigError(f"{folder}: too many tags: all together, {MOST_CHARACTERS:,} characters")
    _write(folder, notes)
    return notes


def change_note(folder: Path, text: str) -> Notes:
    """Replace the note; what there is then."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"a note has at most {MOST_CHARACTERS:,} characters, not {len(text):,}")
    notes = read_notes(folder)
    notes.note = text
    _write(folder, notes)
    return notes


def _write(folder: Path, notes: Notes) -> None:
    path = folder / RUN_FILES.notes
    if notes == Notes():
        path.unlink(missing_ok=True)
    else:
        write_json_atomic(path, notes)
