"""From a row to the text of one document, and which characters of it the loss counts."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from toolkit.data.prepare.text.instructions.checks import (
    check_nothing_dropped,
    check_tools,
    dropped_text,
    excerpt,
    has_stop,
    is_ambiguous,
)
from toolkit.data.prepare.text.instructions.named import NamedTemplates
from toolkit.data.prepare.text.instructions.shapes import Conversation, read_conversation
from toolkit.data.prepare.text.instructions.template import ChatTemplate, Rendering, Span, texts
from toolkit.data.prepare.text.instructions.turns import answer_spans
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


class RowRenderer:
    """Renders rows by one config.

    Args:
        templates: without any, prompts and completions are joined as they are.
        append_eos: whether an end-of-document token follows each document.
    """

    def __init__(
        self,
        config: InstructionsConfig,
        templates: NamedTemplates,
        *,
        bos_token: str | None,
        eos_token: str | None,
        append_eos: bool,
    ) -> None:
        self._config, self._templates, self._append_eos = config, templates, append_eos
        self._bos_token, self._eos_token = bos_token, eos_token

    def render(self, row: dict[str, Any], where: str) -> RenderedRow | None:
        """The text of a row; None when there is nothing in it to train on.

        Raises:
            DataError: the row has no known shape, or the template does not suit it; names the row
                and shows what was rendered.
        """
        conversation = read_conversation(row, self._config, where)
        if not conversation.messages:
            return None
        answers = conversation.answers()
        if self._config.train_on == "last_assistant":
            answers = answers[-1:]
        if len(conversation.masked) == len(conversation.messages):
            return None
        if conversation.masked and self._config.train_on == "all":
            raise DataError(
                f"{where}: message {conversation.masked[0]} says that it is not trained on, and "
                "dataset.instructions.train_on is all; set it to assistant, or take the key out"
            )
        answers = [number for number in answers if number not in conversation.masked]
        if not answers and self._config.train_on != "all":
            return None
        try:
            template = self._templates.choose(has_tools=bool(conversation.tools))
            if template is None:
                return self._join(conversation)
            rendered = template.render(conversation.messages, conversation.tools)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        targets: list[Span] = []
        try:
            self._check_complete(template, conversation, rendered.text)
            if self._config.train_on != "all":
                targets = answer_spans(template, conversation, rendered, answers)
            return self._finish(template, conversation, rendered, targets, answers)
        except DataError as error:
            targets = targets or self._likely_targets(template, conversation, rendered, answers)
            legend = ", targets in [[ ]]" if targets else ""
            shown = excerpt(rendered.text, targets)
            raise DataError(f"{where}: {error}; the row{legend}: {shown}") from None

    def _likely_targets(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        rendered: Rendering,
        answers: list[int],
    ) -> list[Span]:
        """What the loss would count, to be shown with an error that came before it was known."""
        if self._config.train_on == "all":
            return [(0, len(rendered.text))]
        with contextlib.suppress(DataError):
            return answer_spans(template, conversation, rendered, answers)
        found, position = [], 0
        for number in answers:
            content = conversation.messages[number]["content"].strip()
            start = rendered.text.find(content, position)
            if content and start >= 0:
                position = start + len(content)
                found.append((start, position))
        return found

    def masked_answer(self, row: dict[str, Any], where: str) -> int | None:
        """An answer that is not trained on because the row says so, where none else is."""
        conversation = read_conversation(row, self._config, where)
        answers = conversation.answers()
        if self._config.train_on == "last_assistant":
            answers = answers[-1:]
        is_masked = [number in conversation.masked for number in answers]
        return answers[-1] if answers and all(is_masked) else None

    def sample(self, row: dict[str, Any], where: str) -> str:
        """A row as errors show it."""
        found = self.render(row, where)
        if found is None:
            messages = read_conversation(row, self._config, where).messages
            return " ".join(excerpt(f"{m['role']}: {m['content']}", []) for m in messages)
        whole = [(0, len(found.text))]
        return excerpt(found.text, whole if found.targets is None else found.targets)

    def _check_complete(
        self, template: ChatTemplate, conversation: Conversation, text: str
    ) -> None:
        messages = conversation.messages
        check_nothing_dropped(messages, text)
        check_tools(template, conversation, text)
        others = [template.text]
        for message in messages:
            others += texts([v for k, v in message.items() if k not in ("role", "content")])
        others += texts(conversation.tools)
        if is_ambiguous(messages, text, others):
            number = template.dropped(messages, conversation.tools, text)
            if number is not None:
                raise dropped_text(number, messages[number])

    def _join(self, conversation: Conversation) -> RenderedRow:
        if conversation.plain is None or conversation.tools:
            what = "is a conversation" if conversation.plain is None else "has tools"
            raise DataError(
                f"{what}, and the tokenizer has no chat template; give one in "
                "dataset.instructions.chat_template (Jinja text or a file)"
            )
        prompt, completion = conversation.plain
        text = prompt + completion
        if self._config.train_on == "all":
            return RenderedRow(text, None, has_controls=False)
        targets = [(len(prompt), len(text))]
        if not self._append_eos:
            raise DataError(
                f"{_missing_stop('set dataset.append_eos=true')}; the row, targets in "
                f"[[ ]]: {excerpt(text, targets)}"
            )
        return RenderedRow(text, targets, has_controls=False)

    def _finish(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        rendered: Rendering,
        targets: list[Span],
        answers: list[int],
    ) -> RenderedRow:
        text = rendered.text
        literals = template.literals(conversation.messages, conversation.tools, text)
        closing = template.closing_token(text, literals)
        ends_with_eos = closing is not None and text[slice(*closing)] == self._eos_token
        if closing is not None and ends_with_eos:
            # White space after it would be a document of its own.
            text = text[: closing[1]]
        all_of_it = self._config.train_on == "all"
        if all_of_it and not self._append_eos and closing is None and answers:
            last = answers[-1] if answers[-1] == len(conversation.messages) - 1 else None
            if last is not None and not has_stop(text, conversation, last):
                raise DataError(_missing_stop(_ADVICE))
        stops = (
            []
            if all_of_it
            else self._stops(template, conversation, text, targets, answers, literals)
        )
        if not all_of_it and not stops:
            raise DataError(
                "the chat template marks nothing of the assistant's answers with {% generation %}"
            )
        return RenderedRow(
            text,
            None if all_of_it else [(start, end) for start, end, _ in stops],
            has_controls=True,
            literals=literals,
            eos_is_target=all_of_it or (stops[-1][1] == len(text) and not stops[-1][2]),
            starts_with_bos=bool(self._bos_token)
            and text.startswith(self._bos_token or "")
            and 0 not in literals,
            ends_with_eos=ends_with_eos,
        )

    def _stops(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        text: str,
        targets: list[Span],
        answers: list[int],
        literals: list[int],
    ) -> list[tuple[int, int, bool]]:
        """The targets with their ends put right, and whether a control token ends each.

        Raises:
            DataError: nothing tells the model to stop at the end of one of them.
        """
        found = []
        for number, (start, end) in enumerate(targets):
            end = min(end, len(text))
            said = text[start:end]
            inside = [place - start for place in literals if start <= place < end]
            closing = template.closing_token(said, inside)
            if closing is not None:
                # Nobody asks the model for the white space after its last token.
                end = end if template.has_marks else start + closing[1]
            elif not text[end:].strip() and self._append_eos:
                # The end-of-document token that follows is what tells it.
                end = len(text)
            else:
                answer = answers[number] if len(answers) == len(targets) else None
                if not has_stop(said, conversation, answer):
                    raise DataError(_missing_stop(_MARKS_ADVICE if template.has_marks else _ADVICE))
            found.append((start, end, closing is not None))
        return found


def _missing_stop(advice: str) -> str:
    return (
        "nothing tells the model to stop: in the text, what the loss counts of an answer is "
        f"followed by no end of turn; {advice}"
    )
