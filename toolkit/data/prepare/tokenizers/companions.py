"""The files that lie beside a tokenizer.json: settings, vocabularies of older formats, and chat
templates."""

from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.storage.foreign import read_bytes
from toolkit.storage.foreign import read_json as read_foreign_json

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
COMPANION_FILES = (
    TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, "added_tokens.json", CHAT_TEMPLATE_FILE,
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
"""What may lie beside a tokenizer.json and belongs to it; see `companions`."""
TEMPLATES_FOLDER = "additional_chat_templates"
"""Folder of chat templates with names, beside it."""

_BEGINNINGS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")

Files = dict[str, Path | str | dict[str, Any]]
"""Companions of tokenizer.json by name: a file to copy, text, or what is written as JSON."""


def chat_templates(files: Files) -> dict[str, str]:
    """See `Tokenizer.chat_templates`; of the companions `files` of a tokenizer.json."""
    found = {
        "default" if name == CHAT_TEMPLATE_FILE else Path(name).stem: _text_of(content)
        for name, content in files.items()
        if name.endswith(".jinja")
    }
    if found:
        return found
    template = settings_of(files).get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in entries}
    named = template.items() if isinstance(template, dict) else ()
    return {name: text for name, text in named if isinstance(text, str)}


def settings_of(files: Files) -> dict[str, Any]:
    """What tokenizer_config.json says; empty where it is not among `files`."""
    content = files.get(TOKENIZER_CONFIG_FILE, {})
    if isinstance(content, Path):
        return read_json(content)
    assert isinstance(content, dict)
    return content


def _text_of(template: object) -> str:
    if not isinstance(template, Path):
        return str(template)
    try:
        return read_bytes(template, DataError).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{template}: not UTF-8 text (byte {error.start}); correct it, or give another chat "
            "template"
        ) from None


def companions_of(folder: Path) -> Files:
    """The files that belong to the tokenizer.json of a folder, by their names relative to it."""
    templates = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    names = [*COMPANION_FILES, *(f"{TEMPLATES_FOLDER}/{path.name}" for path in templates)]
    return {name: folder / name for name in names if (folder / name).is_file()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file of a tokenizer, in any format that `transformers` can load."""
    names = (path.name for path in folder.iterdir() if path.is_file())
    return any(name.startswith(_BEGINNINGS) or name.endswith(".model") for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. DataError: it holds something else."""
    try:
        return read_foreign_json(path, DataError)
    except FileNotFoundError:
        return {}
