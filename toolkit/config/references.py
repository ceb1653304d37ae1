"""`${NAME}` in a text: which environment variables it names, and the text with their values."""

import re
from collections.abc import Mapping

from toolkit.errors import ConfigError

_REFERENCE = re.compile(r"\$(?P<escape>\$?)\{(?P<name>[A-Za-z_]\w*)\}")
_MIXES = "docs/recipes.md#mixes"


def names_in(text: str) -> list[str]:
    """The variables that `text` names; `$${NAME}` names none."""
    return [match["name"] for match in _REFERENCE.finditer(text) if not match["escape"]]


def filled_text(text: str, environ: Mapping[str, str], path: str) -> str:
    """`text` with the values of its variables, `$${NAME}` as `${NAME}`. Raises ConfigError about
    `path`: a variable is not set."""

    def content(match: re.Match[str]) -> str:
        name = match["name"]
        if match["escape"]:
            return f"${{{name}}}"
        if name not in environ:
            advice = (
                f"export it ({_MIXES} says what the mixes that come along need)"
                if path.startswith("dataset.mix.")
                else f"export it, or write $${{{name}}} for that text itself"
            )
            problem = f"${{{name}}}: the environment variable {name} is not set; {advice}"
            raise ConfigError(problem, key=path)
        return environ[name]

    return _REFERENCE.sub(content, text)
