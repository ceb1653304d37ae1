"""From a row to the text of one document, and which characters of it the loss counts.

What the chat template writes of the answers is in `written.py`; here it is chosen, and its ends are
put right: something must tell the model to stop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.data.prepare.text.instructions.checks import (
    excerpt,
    has_stop,
)
from toolkit.data.prepare.text.instructions.conversations import (
    ASSISTANT,
    Conversation,
    read_conversation,
)
from toolkit.data.prepare.text.instructions.template import (
    CONFIG_PATH,
    ChatTemplate,
    Span,
)
from toolkit.data.prepare.text.instructions.written import Written
from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import DataError

_ADVICE = "let the template write eos_token, or another end of turn, after what the assistant says"
_MARKS_ADVICE = "let the template put {% endgeneration %} behind the token that ends the turn"


class RenderedRow(NamedTuple):
    """The text of one document."""

    text: str
    targets: list[Span] | None
    """Characters that the loss counts, ascending; None: all."""
    has_controls: bool
    """Whether a template wrote it: names of control tokens are these tokens then."""
    literals: Sequence[int] = ()
    """Where names of control tokens start that are ordinary text all the same."""
    eos_is_target: bool = True
    """Whether the loss counts the end-of-document token that follows."""
    starts_with_bos: bool = False
    ends_with_eos: bool = False


class Side(NamedTuple):
    """A prompt with an answer to it."""

    rendered: RenderedRow
    start: int
    """Where the prompt ends and the answer starts, in characters."""


class Outline(NamedTuple):
    """A row and what it is made of."""

    rendered: RenderedRow
    template: str
    """Name of the chat template; `none`: there is none."""
    turns: list[tuple[str, Span]]
    """Role of each message, and its characters, with what the template writes around it."""
    sample: str
    """As errors show it."""


class RowRenderer:
    """Renders rows by one config; without `templates`, prompts and completions are joined as they
    are. ConfigError if a template is not valid Jinja.

    Args:
        templates: the tokenizer's chat templates by name. They are chosen as `transformers` does:
            `tool_use` is for rows with tools, `default` for all others.
        make: the template of a text.
        append_eos: whether an end-of-document token follows each document.
    """

    def __init__(
        self,
        config: InstructionsConfig,
        templates: Mapping[str, str],
        make: Callable[[str], ChatTemplate],
        *,
        bos_token: str | None,
        eos_token: str | None,
        append_eos: bool,
    ) -> None:
        self._config, self._append_eos = config, append_eos
        self._names = sorted(templates)
        self._made = {n: make(templates[n]) for n in ("default", "tool_use") if n in templates}
        self._bos_token, self._eos_token = bos_token, eos_token
        self._counts_all = config.train_on == "all"

    def render(self, row: dict[str, Any]) -> RenderedRow | None:
        """The text of a row; None when there is nothing in it to train on. DataError, which shows
        what was rendered, where the row has no known shape, or the template does not suit it."""
        found = self._render(read_conversation(row, self._config), is_side=False)
        return None if found is None else found.rendered

    def render_side(self, conversation: Conversation) -> Side | None:
        """The same of a conversation with a prompt, a side of a preference row. Where the loss
        counts all of it, that is all after the prompt."""
        found = self._render(conversation, is_side=True)
        if found is None or found.rendered.targets is not None:
            return found
        targets = [(found.start, len(found.rendered.text))]
        return found._replace(rendered=found.rendered._replace(targets=targets))

    def _render(self, conversation: Conversation, *, is_side: bool) -> Side | None:
        masked = conversation.masked
        if len(masked) == len(conversation.messages):
            return None
        if masked and self._counts_all:
            raise DataError(
                f"message {masked[0]} says that it is not trained on, and "
                "dataset.instructions.train_on is all; set it to assistant, or take the key out"
            )
        answers = [number for number in self._wanted(conversation) if number not in masked]
        if not answers and not self._counts_all:
            return None
        if not self._names or conversation.is_written:
            return Side(self._join(conversation), len((conversation.plain or ("",))[0]))
        written = Written(self._made[self._choose(conversation)], conversation, answers)
        targets: list[Span] = []
        try:
            written.check_complete(self._config.ignored_keys)
            if not self._counts_all:
                targets = written.answer_spans()
            start = written.side_start(targets) if is_side else 0
            return Side(self._finish(written, targets), start)
        except DataError as error:
            if not targets:
                whole = [(0, len(written.text))]
                targets = whole if self._counts_all else written.likely_spans()
            legend = ", targets in [[ ]]" if targets else ""
            shown = excerpt(written.text, targets)
            raise DataError(f"{error}; the row{legend}: {shown}") from None

    def outline(self, row: dict[str, Any]) -> Outline:
        """What a row that `render` gives text for is made of."""
        rendered = self.render(row)
        assert rendered is not None, "it has a target"
        conversation, text = read_conversation(row, self._config), rendered.text
        if self._names:
            name = self._choose(conversation)
            turns = Written(self._made[name], conversation, []).turns()
        else:
            name, place = "none", len((conversation.plain or ("", ""))[0])
            turns = [("user", (0, place)), (ASSISTANT, (place, len(text)))]
        targets = rendered.targets or [(0, len(text))]
        return Outline(rendered, name, turns, excerpt(text, targets))

    def template_of(self, conversation: Conversation) -> str:
        """Name of the template that a conversation takes; `none`: it takes none."""
        if not self._names or conversation.is_written:
            return "none"
        return self._choose(conversation)

    def _choose(self, conversation: Conversation) -> str:
        """The name of the template for a conversation."""
        names = ("tool_use", "default") if conversation.tools else ("default",)
        for name in names:
            if name in self._made:
                return name
        raise DataError(
            f"the tokenizer's chat templates are called {', '.join(self._names)}, and none is the "
            f"default one; set {CONFIG_PATH} to one of these names, to Jinja text or to a file"
        )

    def masked_answer(self, row: dict[str, Any]) -> int | None:
        """An answer that is not trained on because the row says so, where none else is."""
        conversation = read_conversation(row, self._config)
        answers = self._wanted(conversation)
        return answers[-1] if answers and {*answers} <= {*conversation.masked} else None

    def sample(self, row: dict[str, Any]) -> str:
        """A row as errors show it."""
        found = self.render(row)
        if found is None:
            messages = read_conversation(row, self._config).messages
            return " ".join(excerpt(f"{m['role']}: {m['content']}", []) for m in messages)
        whole = [(0, len(found.text))]
        return excerpt(found.text, whole if found.targets is None else found.targets)

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The answers that the config asks for, were none masked."""
        answers = conversation.answers()
        return answers[-1:] if self._config.train_on == "last_assistant" else answers

    def _join(self, conversation: Conversation) -> RenderedRow:
        if conversation.plain is None or conversation.tools:
            what = "is a conversation" if conversation.plain is None else "has tools"
            raise DataError(
                f"{what}, and the tokenizer has no chat template; give one in {CONFIG_PATH} (Jinja "
                "text or a file)"
            )
        prompt, completion = conversation.plain
        text = prompt + completion
        if self._counts_all:
            return RenderedRow(text, None, has_controls=False)
        targets = [(len(prompt), len(text))]
        if not self._append_eos:
            raise DataError(
                f"{_missing_stop('set dataset.append_eos=true')}; the row, targets in "
                f"[[ ]]: {excerpt(text, targets)}"
            )
        return RenderedRow(text, targets, has_controls=False)

    def _finish(self, written: "Written", targets: list[Span]) -> RenderedRow:
        template, conversation, text = written.template, written.conversation, written.text
        literals = template.literals(conversation.messages, conversation.tools, text)
        closing = template.closing_token(text, literals)
        ends_with_eos = closing is not None and text[slice(*closing)] == self._eos_token
        if closing is not None and ends_with_eos:
            # White space after it would be a document of its own.
            text = text[: closing[1]]
        bos = self._bos_token
        row = RenderedRow(
            text,
            None,
            has_controls=True,
            literals=literals,
            starts_with_bos=bool(bos) and text.startswith(bos or "") and 0 not in literals,
            ends_with_eos=ends_with_eos,
        )
        if self._counts_all:
            last = len(conversation.messages) - 1
            is_open = not self._append_eos and closing is None and written.answers[-1:] == [last]
            if is_open and not has_stop(text, conversation, last):
                raise DataError(_missing_stop(_ADVICE))
            return row
        if not targets:
            raise DataError(
                "the chat template marks nothing of the assistant's answers with {% generation %}"
            )
        # The targets with their ends put right; something must tell the model to stop there.
        is_closed = False
        for number, (start, end) in enumerate(targets):
            end = min(end, len(text))
            said = text[start:end]
            inside = [place - start for place in literals if start <= place < end]
            closing = template.closing_token(said, inside)
            is_closed = closing is not None
            if closing is not None:
                # Nobody asks the model for the white space after its last token.
                end = end if template.has_marks else start + closing[1]
            elif not text[end:].strip() and self._append_eos:
                # The end-of-document token that follows is what tells it.
                end = len(text)
            else:
                answer = written.answers[number] if len(written.answers) == len(targets) else None
                if not has_stop(said, conversation, answer):
                    advice = _MARKS_ADVICE if template.has_marks else _ADVICE
                    if number < len(targets) - 1:  # the last may have an end of its own
                        advice = f"set dataset.instructions.train_on=last_assistant, or {advice}"
                    raise DataError(_missing_stop(advice))
            targets[number] = start, end
        eos_is_target = targets[-1][1] == len(text) and not is_closed
        return row._replace(targets=targets, eos_is_target=eos_is_target)


def _missing_stop(advice: str) -> str:
    return (
        "nothing tells the model to stop: in the text, what the loss counts of an answer is "
        f"followed by no end of turn; {advice}"
    )
