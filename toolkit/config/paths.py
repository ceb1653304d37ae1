"""Local paths as config values: refused before anything is made of them that nobody meant.

The types mark the fields; `check.py` calls `path_problem` for each of them.
"""

import os
import re
from pathlib import Path
from typing import Annotated

import msgspec

from toolkit.config.types import is_text, shown
from toolkit.errors import ConfigError

NOTE = "path"
"""Key under which the type of a field says that it is a local path."""

LocalPath = Annotated[str, msgspec.Meta(extra={NOTE: "local"})]
"""A file or folder of this machine, never a URL."""
PathOrURL = Annotated[str, msgspec.Meta(extra={NOTE: "url"})]
"""A file or folder of this machine, or the URL of one elsewhere."""
NewName = Annotated[str, msgspec.Meta(extra={NOTE: "name"})]
"""The name of a folder that will be made."""

LONGEST_NAME = 255
LONGEST_PATH = 4095
"""Bytes that Linux takes in the name of a file, and in a path."""

# "s3:/bucket" is what joining and normalising paths makes of "s3://bucket".
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_STORES = (
    "token files are kept on other machines by store.permanent_root, and runs by run.save_folder"
)


def path_problem(text: str, kind: str) -> str | None:
    """What is wrong with `text` in a field marked with `kind`, as far as no disk is asked."""
    if not is_text(text):
        return f"{shown(text)} is not UTF-8 text"
    if not text:
        return "an empty name" if kind == "name" else "empty; write . for the current folder"
    url = _URL.match(text)
    if url is not None and kind == "local":
        if url[1] in ("file", "local"):
            return f"a URL; write the path itself: /{url[2].lstrip('/')}"
        return f"{shown(text)} is a URL, and this must be on this machine; {_STORES}"
    if url is not None and kind == "url":
        whole = f"{url[1]}://"
        return None if text.startswith(whole) else f"{shown(text)}: a URL begins with {whole}"
    for name in text.split("/"):
        if (size := len(os.fsencode(name))) > LONGEST_NAME:
            return f"the name {name[:20]}... has {size} bytes; {LONGEST_NAME} at most"
    if len(os.fsencode(text)) > LONGEST_PATH:
        return f"a path of {len(os.fsencode(text))} bytes; {LONGEST_PATH} at most"
    if kind != "name" and text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            return f"{text.partition('/')[0]}: no such user on this machine"
    return None


def local_path(text: str, what: str) -> Path:
    """`text`, given for the option or argument `what`, as a path, `~` filled in. Raises ConfigError
    where it cannot be a local path."""
    if problem := path_problem(text, "local"):
        raise ConfigError(f"{what}: {problem}")
    return Path(text).expanduser()
