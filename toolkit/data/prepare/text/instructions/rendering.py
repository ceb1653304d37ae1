"""From a row to the text of one document, and which characters of it the loss counts.

A template with `{% generation %}` marks says it itself. Of any other, an answer is what the
template writes for the conversation up to it, less what it writes for the conversation before it
with the generation prompt: what a model sees when it is its turn, and what it should say then. That
holds only where the template never takes back what it wrote for fewer messages; where it does (as
those that drop the reasoning of earlier turns), it is an error, not a guess.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.instructions.checks import (
    check_marks,
    check_nothing_dropped,
    check_tools,
    dropped_text,
    excerpt,
    has_stop,
    is_ambiguous,
)
from toolkit.data.prepare.text.instructions.messages import ASSISTANT
from toolkit.data.prepare.text.instructions.shapes import Conversation, read_conversation
from toolkit.data.prepare.text.instructions.template import (
    ChatTemplate,
    NamedTemplates,
    Rendering,
    Span,
)
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


class _Rendered(NamedTuple):
    """A conversation that a template has written."""

    template: ChatTemplate
    conversation: Conversation
    text: str
    marks: list[Span]
    answers: list[int]
    """The messages that the loss counts."""

    def fewer(self, count: int, *, add_generation_prompt: bool = False) -> Rendering:
        """What the template writes for the first messages alone."""
        messages, tools = self.conversation.messages[:count], self.conversation.tools
        return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)


class RowRenderer:
    """Renders rows by one config; without `templates`, prompts and completions are joined as they
    are. `append_eos` tells whether an end-of-document token follows each document."""

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
        self._counts_all = config.train_on == "all"

    def render(self, row: dict[str, Any]) -> RenderedRow | None:
        """The text of a row; None when there is nothing in it to train on. DataError, which shows
        what was rendered, where the row has no known shape, or the template does not suit it."""
        conversation = read_conversation(row, self._config)
        messages, masked = conversation.messages, conversation.masked
        if len(masked) == len(messages):
            return None
        if masked and self._counts_all:
            raise DataError(
                f"message {masked[0]} says that it is not trained on, and "
                "dataset.instructions.train_on is all; set it to assistant, or take the key out"
            )
        answers = [number for number in self._wanted(conversation) if number not in masked]
        if not answers and not self._counts_all:
            return None
        template = self._templates.choose(has_tools=bool(conversation.tools))
        if template is None:
            return self._join(conversation)
        rendering = template.render(messages, conversation.tools)
        rendered = _Rendered(template, conversation, *rendering, answers)
        targets: list[Span] = []
        try:
            _check_complete(rendered)
            if not self._counts_all:
                targets = _answer_spans(rendered)
            return self._finish(rendered, targets)
        except DataError as error:
            targets = targets or self._likely_targets(rendered)
            legend = ", targets in [[ ]]" if targets else ""
            shown = excerpt(rendered.text, targets)
            raise DataError(f"{error}; the row{legend}: {shown}") from None

    def masked_answer(self, row: dict[str, Any]) -> int | None:
        """An answer that is not trained on because the row says so, where none else is."""
        conversation = read_conversation(row, self._config)
        answers = self._wanted(conversation)
        all_masked = all(number in conversation.masked for number in answers)
        return answers[-1] if answers and all_masked else None

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

    def _likely_targets(self, rendered: _Rendered) -> list[Span]:
        """What the loss would count, to be shown with an error that came before it was known."""
        if self._counts_all:
            return [(0, len(rendered.text))]
        with contextlib.suppress(DataError):
            return _answer_spans(rendered)
        found, position = [], 0
        for number in rendered.answers:
            content = rendered.conversation.messages[number]["content"].strip()
            start = rendered.text.find(content, position)
            if content and start >= 0:
                position = start + len(content)
                found.append((start, position))
        return found

    def _join(self, conversation: Conversation) -> RenderedRow:
        if conversation.plain is None or conversation.tools:
            what = "is a conversation" if conversation.plain is None else "has tools"
            raise DataError(
                f"{what}, and the tokenizer has no chat template; give one in "
                "dataset.instructions.chat_template (Jinja text or a file)"
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

    def _finish(self, rendered: _Rendered, targets: list[Span]) -> RenderedRow:
        template, conversation, text = rendered.template, rendered.conversation, rendered.text
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
            is_open = not self._append_eos and closing is None and rendered.answers[-1:] == [last]
            if is_open and not has_stop(text, conversation, last):
                raise DataError(_missing_stop(_ADVICE))
            return row
        stops = self._stops(rendered._replace(text=text), targets, literals)
        if not stops:
            raise DataError(
                "the chat template marks nothing of the assistant's answers with {% generation %}"
            )
        return row._replace(
            targets=[(start, end) for start, end, _ in stops],
            eos_is_target=stops[-1][1] == len(text) and not stops[-1][2],
        )

    def _stops(
        self, rendered: _Rendered, targets: list[Span], literals: list[int]
    ) -> list[tuple[int, int, bool]]:
        """The targets with their ends put right, and whether a control token ends each; DataError
        where nothing tells the model to stop at the end of one of them."""
        template, conversation, text, _, answers = rendered
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


def _check_complete(rendered: _Rendered) -> None:
    """Every message, tool call and tool of the row reaches the text."""
    template, conversation, text = rendered.template, rendered.conversation, rendered.text
    messages = conversation.messages
    check_nothing_dropped(messages, text)
    check_tools(template, conversation, text)
    others = [template.text, *row_texts(conversation.tools)]
    for message in messages:
        others += row_texts([v for k, v in message.items() if k not in ("role", "content")])
    if is_ambiguous(messages, text, others):
        number = template.dropped(messages, conversation.tools, text)
        if number is not None:
            raise dropped_text(number, messages[number])


def _answer_spans(rendered: _Rendered) -> list[Span]:
    """Where the answers stand, their end-of-turn tokens included. With marks there may be several
    spans for one, or none. DataError where the template writes a turn differently once others
    follow."""
    answers = rendered.answers
    if rendered.template.has_marks:
        spans = _marked_spans(rendered)
        marked = [rendered.text[start:end] for start, end in spans]
        check_marks(marked, rendered.conversation, answers)
        return spans
    spans = []
    for answer in answers:
        span = _span(rendered, answer)
        if span is None:
            is_last = answer == answers[-1]
            advice = "" if is_last else "set dataset.instructions.train_on=last_assistant, or "
            raise DataError(
                f"the chat template writes message {answer} (assistant) or what stands before it "
                "differently once the answer or other messages follow, so what the model would see "
                f"and say at that point is not in the text; {advice}give a chat_template that "
                "leaves earlier text as it was, or marks answers with {% generation %}"
            )
        spans.append(span)
    return spans


def _marked_spans(rendered: _Rendered) -> list[Span]:
    conversation = rendered.conversation

    def before(number: int) -> int:
        """How many marks the template puts into the messages before message `number`."""
        if all(message["role"] != ASSISTANT for message in conversation.messages[:number]):
            return 0
        return len(rendered.fewer(number).marks)

    first, masked = rendered.answers[0], set(conversation.masked) & set(conversation.answers())
    if not any(number > first for number in masked):
        return rendered.marks[before(first) :]
    return [
        span
        for answer in rendered.answers
        for span in rendered.marks[before(answer) : before(answer + 1)]
    ]


def _span(rendered: _Rendered, answer: int) -> Span | None:
    """None: what the template writes for fewer messages is no beginning of the text."""
    template, conversation, text, _, _ = rendered
    content = conversation.messages[answer]["content"].strip()
    try:
        before = rendered.fewer(answer, add_generation_prompt=True).text
    except DataError:
        # Templates may look at the first message, and there is none before this answer.
        if answer > 0 or content not in text:
            raise
        before = text[: text.index(content)]
    start = _shared(template, text, before)
    end = len(text) if start is not None else None
    if answer + 1 < len(conversation.messages):
        end = _shared(template, text, rendered.fewer(answer + 1).text)
    if start is None or end is None or end < start:
        return None
    if not template.has_generation_prompt and content:
        # The name of the role stands before the answer, and the model is never asked for it.
        place = text.find(content, start, end)
        if place >= 0 and text[start:place].strip():
            start = place
    return start, end


def _shared(template: ChatTemplate, text: str, fewer: str) -> int | None:
    """How much of `text` the rendering of fewer messages is; None: it is no beginning of it."""
    if text.startswith(fewer):
        return len(fewer)
    # Some templates close the whole conversation with one more token: no part of the turn.
    closing = template.closing_token(fewer)
    if closing is not None and text.startswith(fewer[: closing[0]]):
        return closing[0]
    return None
