"""Files of prompts: what `toolkit generate --file` reads and `--output` writes."""

from pathlib import Path
from typing import Any

import msgspec

from toolkit.errors import DataError
from toolkit.storage.foreign import read_bytes, reason_of

MAX_PROMPTS_BYTES = 1 << 30


class Prompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a .jsonl file, or of plain text. Either of the two is given."""

    prompt: str | None = None
    """Text to continue."""
    messages: list[dict[str, str]] | None = None
    """A conversation to answer; each has a role and a content."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: of .jsonl, one object a line; of other files, each line that is not
    empty. Raises DataError: it cannot be read, or a line holds something else."""
    try:
        lines = read_bytes(path, DataError, max_bytes=MAX_PROMPTS_BYTES).decode().splitlines()
    except FileNotFoundError:
        raise DataError(f"--file: {path}: cannot be read: No such file or directory") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--file: {path}: not UTF-8 at byte {error.start}") from None
    is_jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts = [
        _parse(line, f"--file: {path}: line {number}") if is_jsonl else Prompt(prompt=line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"--file: {path}: holds no prompt; write one on each line")
    return prompts


def completed(prompt: Prompt, text: str) -> dict[str, Any]:
    """`prompt` with its continuation, in the form of training data: `prompt` and `completion`, or
    `messages` that end with the answer."""
    if prompt.messages is None:
        return {"prompt": prompt.prompt, "completion": text}
    return {"messages": [*prompt.messages, {"role": "assistant", "content": text}]}


def _parse(line: str, where: str) -> Prompt:
    try:
        found = msgspec.json.decode(line, type=Prompt)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{where}: {reason_of(error)}") from None
    if (found.prompt is None) == (found.messages is None):
        raise DataError(f'{where}: give an object with "prompt", or one with "messages"')
    if any(not {"role", "content"} <= message.keys() for message in found.messages or ()):
        raise DataError(f'{where}: each of "messages" needs a "role" and a "content"')
    return found
