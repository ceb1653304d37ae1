"""Which of a tokenizer's chat templates renders a row: those that have names, as `transformers`
chooses among them."""

from collections.abc import Callable, Mapping

from toolkit.data.prepare.text.instructions.template import CONFIG_PATH, ChatTemplate
from toolkit.errors import DataError

DEFAULT = "default"
TOOL_USE = "tool_use"


class NamedTemplates:
    """Chat templates by name; `tool_use` is for rows with tools, `default` for all others.

    Raises:
        ConfigError: one of the two is not valid Jinja.
    """

    def __init__(self, texts: Mapping[str, str], make: Callable[[str], ChatTemplate]) -> None:
        self._names = sorted(texts)
        self._made = {name: make(texts[name]) for name in (DEFAULT, TOOL_USE) if name in texts}

    def choose(self, *, has_tools: bool) -> ChatTemplate | None:
        """The template for a row; None: the tokenizer has none at all.

        Raises:
            DataError: it has some, but none for this row.
        """
        if not self._names:
            return None
        found = self._made.get(TOOL_USE) if has_tools else None
        found = found or self._made.get(DEFAULT)
        if found is None:
            raise DataError(
                f"the tokenizer's chat templates are called {', '.join(self._names)}, and none is "
                f"the {DEFAULT} one; set {CONFIG_PATH} to one of these names, to Jinja text or to "
                "a file"
            )
        return found
