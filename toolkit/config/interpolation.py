"""`${NAME}` in the values of a config: stored as it is written, filled in at each start.

A text of a config may name environment variables, anywhere in it:
`postgresql://me:${DB_PASSWORD}@host/runs`, `${DATA}/corpus`. The run folder, its origins and its
checkpoints keep the name; every command that loads the config puts in the value that the variable
has then. `$${NAME}` stands for the text `${NAME}` itself. Fields that hold text for people, models
or templates (`_PROSE_FIELDS`) are left alone. Fields that hold no text are filled in when the
config is first loaded (`check`), and keep that value.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from toolkit.config.base import Config
from toolkit.config.check import convert
from toolkit.config.references import filled_text, names_in
from toolkit.config.types import join
from toolkit.errors import ConfigError

_PROSE_FIELDS = {
    "description", "chat_template", "system_prompt", "text_template", "prompts", "prompt",
}  # fmt: skip

T = TypeVar("T", bound=Config)


def fill(config: T, environ: Mapping[str, str] | None = None) -> T:
    """`config` with the values of the variables that its texts name; itself where they name none.
    Raises ConfigError: a variable is not set, or what it holds does not fit."""
    data = config.to_dict()
    filled = _fill(data, os.environ if environ is None else environ, "")
    if filled == data:
        return config
    try:
        return convert(filled, type(config))
    except ConfigError as error:
        problem = f"{error.problem} (after filling in ${{...}} of the config)"
        raise ConfigError(problem, key=error.key) from None


def variables(config: Config) -> list[str]:
    """Names of the variables that texts of `config` name, sorted."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in _PROSE_FIELDS:
                    look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)
        elif isinstance(value, str):
            found.update(names_in(value))

    look(config.to_dict())
    return sorted(found)


def fill_text(text: str) -> str:
    """One text of a config, filled in."""
    return str(_fill(text, os.environ, "config"))


def _fill(value: Any, environ: Mapping[str, str], path: str) -> Any:
    if isinstance(value, dict):
        return {
            key: inner if key in _PROSE_FIELDS else _fill(inner, environ, join(path, key))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_fill(inner, environ, join(path, n)) for n, inner in enumerate(value)]
    return filled_text(value, environ, path) if isinstance(value, str) else value
