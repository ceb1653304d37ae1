"""Chat templates: Jinja text that turns a conversation into the text a model is trained on.

They run as `transformers` runs them, in a sandbox and with the same helpers (`raise_exception`,
`strftime_now`, `tojson`, `{% generation %}`, loop controls), so that what is trained on is what
`apply_chat_template` gives later. Nothing here needs torch.
"""

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.instructions import template_process
from toolkit.data.prepare.text.instructions.conversations import Message
from toolkit.errors import ConfigError, DataError
from toolkit.storage.foreign import read_bytes, reason_of

CONFIG_PATH = "dataset.instructions.chat_template"
Span = tuple[int, int]
"""First character, and one past the last."""

_MARK = re.compile(r"\{%-?\+?\s*generation\b")
# Stands for the first character of a control token's name in text that came with a row. From a
# plane for private use: not white space, and no template looks for it.
_STAND_IN = "\U000f0000"
# For messages, from the same plane.
_MARKS = range(ord(_STAND_IN) + 1, ord(_STAND_IN) + 0xFFFE)
_TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")


class Rendering(NamedTuple):
    """What a template made of a conversation."""

    text: str
    marks: list[Span]
    """What stands between `{% generation %}` and `{% endgeneration %}`."""


class ChatTemplate:
    """A template, and the control tokens it may write; ConfigError if it is not valid Jinja.

    Attributes:
        has_marks: whether the template itself says what is trained on.
        has_generation_prompt: whether it can write what stands before an answer.
    """

    def __init__(
        self, text: str, *, control_tokens: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        self.text = text
        self.has_marks = _MARK.search(text) is not None
        self.has_generation_prompt = "add_generation_prompt" in text
        self._variables = dict(variables)
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        with contextlib.suppress(DataError):
            # Many templates refuse an empty conversation. What is no Jinja shows here all the same.
            self.render([])

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """The text of a conversation; DataError where the template refuses it."""
        request = {
            "conversations": [messages],
            "tools": tools,
            "chat_template": self.text,
            "return_assistant_tokens_mask": self.has_marks,
            "add_generation_prompt": add_generation_prompt,
            **self._variables,
        }
        try:
            text, marks = template_process.render(request)
        except template_process.TemplateError as error:
            if error.line is not None:
                raise ConfigError(
                    f"{CONFIG_PATH} (or the tokenizer's own template): not valid Jinja: line "
                    f"{error.line}: {error}"
                ) from None
            raise DataError(f"the chat template cannot render it: {error}") from None
        return Rendering(text, [(start, end) for start, end in marks if start < end])

    def closing_token(self, text: str, literals: Sequence[int] = ()) -> Span | None:
        """The control token that `text` ends with, white space after it aside; names that start at
        `literals` are ordinary text."""
        end = len(text.rstrip())
        found = None
        # Names are short, and only one that reaches to the end counts.
        for match in self._controls.finditer(text, max(0, end - 256), end):
            if match.end() == end and match.start() not in literals:
                found = match.span()
        return found

    def behind_token(self, text: str, place: int, content: str) -> int:
        """Where `content`, which stands at `place`, ends with the control token behind it."""
        end = place + len(content)
        following = self._controls.match(text, end + len(text[end:]) - len(text[end:].lstrip()))
        return end if following is None else following.end()

    def literals(self, messages: list[Message], tools: list[Any] | None, text: str) -> list[int]:
        """Where names of control tokens start in the rendered `text` that came with the row. The
        conversation is rendered once more with another first character in each such name: it is
        where the two renderings differ. DataError where the template treats text with such names in
        another way than other text.
        """
        if not any(self._controls.search(value) for value in row_texts([messages, tools])):
            return []
        changed = self.render(self._disguised(messages), self._disguised(tools)).text
        if len(changed) == len(text):
            import numpy as np

            pair = [np.frombuffer(t.encode("utf-32-le"), dtype=np.uint32) for t in (text, changed)]
            places: list[int] = np.flatnonzero(pair[0] != pair[1]).tolist()
            if all(changed[p] == _STAND_IN and self._controls.match(text, p) for p in places):
                return places
        raise DataError(
            "a message holds the name of a control token as ordinary text, and the chat template "
            "changes its own text because of it; take the name out of the row, or change the "
            "template"
        )

    def dropped(self, messages: list[Message], tools: list[Any] | None, text: str) -> int | None:
        """Number of the first message that does not reach the rendered `text`; None: there is none,
        or the template refuses to say. The conversation is rendered once more with a character of
        its own in each message: in the last word, which stays where reasoning or space goes."""
        unused = (mark for mark in map(chr, _MARKS) if mark not in text)
        changed, marks = [], {}
        for number, message in enumerate(messages):
            content, place = message["content"], _last_letter(message["content"])
            if place is not None and (mark := next(unused, None)) is not None:
                message = {**message, "content": content[:place] + mark + content[place + 1 :]}
                marks[number] = mark
            changed.append(message)
        try:
            marked = self.render(changed, tools).text
        except DataError:
            return None
        return next((number for number, mark in marks.items() if mark not in marked), None)

    def unused_mark(self, text: str, number: int) -> str:
        """A character that is not in `text`, another one for each number."""
        return next(itertools.islice((m for m in map(chr, _MARKS) if m not in text), number, None))

    def _disguised(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._controls.sub(lambda match: _STAND_IN + match[0][1:], value)
        if isinstance(value, dict):
            return {key: self._disguised(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._disguised(item) for item in value]
        return value


def read_chat_template(text_or_file: str) -> str:
    """The template that the config gives: the text itself, or what the file holds; ConfigError if
    it is neither."""
    if "{{" in text_or_file or "{%" in text_or_file:
        return text_or_file
    try:
        return read_bytes(Path(text_or_file).expanduser(), DataError).decode()
    except (OSError, ValueError, RuntimeError, DataError) as error:
        raise ConfigError(
            f"{CONFIG_PATH}: {text_or_file!r} is no Jinja text (there is no {{{{ in it), and as a "
            f"file it cannot be read: {reason_of(error)}"
        ) from None


def _last_letter(content: str) -> int | None:
    """Of the text outside tags, which templates look for; else of all of it."""
    for text in (_TAG.sub(lambda match: " " * len(match[0]), content), content):
        place = next((i for i in range(len(text) - 1, -1, -1) if text[i].isalnum()), None)
        if place is not None:
            return place
    stripped = content.rstrip()
    return len(stripped) - 1 if stripped else None
