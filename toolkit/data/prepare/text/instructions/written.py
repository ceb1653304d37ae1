"""A conversation as a chat template writes it, and where its answers stand in the text.

A template with `{% generation %}` marks says it itself. Of any other, an answer is what the
template writes for the conversation up to it, less what it writes for the conversation before it
with the generation prompt: what a model sees when it is its turn, and what it should say then. That
holds only where the template never takes back what it wrote for fewer messages; where it does (as
those that drop the reasoning of earlier turns), it is an error, not a guess.
"""

import contextlib
from collections.abc import Sequence

from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.instructions.checks import (
    check_calls,
    check_marks,
    check_nothing_dropped,
    check_reasoning,
    check_tools,
    dropped_text,
    is_ambiguous,
)
from toolkit.data.prepare.text.instructions.conversations import (
    ASSISTANT,
    Conversation,
)
from toolkit.data.prepare.text.instructions.template import (
    ChatTemplate,
    Rendering,
    Span,
)
from toolkit.errors import DataError


class Written:
    """A conversation that a template has written; DataError where it refuses to.

    Attributes:
        answers: the messages that the loss counts.
    """

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, answers: list[int]
    ) -> None:
        self.template, self.conversation, self.answers = template, conversation, answers
        self.text, self._marks = template.render(conversation.messages, conversation.tools)

    def check_complete(self, ignored_keys: Sequence[str]) -> None:
        """Raise DataError unless every message, tool call and tool of the row reaches the text."""
        template, text = self.template, self.text
        messages, tools = self.conversation.messages, self.conversation.tools
        check_nothing_dropped(messages, text)
        check_calls(template, self.conversation, text)
        check_reasoning(template, messages, text, ignored_keys)
        check_tools(template, self.conversation, text)
        others = [template.text, *row_texts(tools)]
        for message in messages:
            others += row_texts([v for k, v in message.items() if k not in ("role", "content")])
        if is_ambiguous(messages, text, others):
            number = template.dropped(messages, tools, text)
            if number is not None:
                raise dropped_text(number, messages[number])

    def answer_spans(self) -> list[Span]:
        """Where the answers stand, their end-of-turn tokens included. With marks there may be
        several spans for one, or none. DataError where the template writes a turn differently once
        others follow."""
        if self.template.has_marks:
            spans = self._marked_spans()
            marked = [self.text[start:end] for start, end in spans]
            check_marks(marked, self.conversation, self.answers)
            return spans
        spans = []
        for answer in self.answers:
            span = self._span(answer)
            if span is None:
                raise self._rewritten(answer)
            spans.append(span)
        return spans

    def _rewritten(self, answer: int) -> DataError:
        is_last = answer == self.answers[-1]
        advice = "" if is_last else "set dataset.instructions.train_on=last_assistant, or "
        return DataError(
            f"the chat template writes message {answer} (assistant) or what stands before it "
            "differently once the answer or other messages follow, so what the model would see "
            f"and say at that point is not in the text; {advice}give a chat_template that leaves "
            "earlier text as it was, or marks answers with {% generation %}"
        )

    def side_start(self, targets: Sequence[Span]) -> int:
        """Where the first message after the prompt starts; `targets` are the answers' spans."""
        first = self.conversation.num_context
        if targets and self.answers[0] == first:
            return targets[0][0]
        if self.template.has_marks:
            start, _ = self._marks[self._num_marks(first)]
            return start
        span = self._span(first)
        if span is None:
            raise self._rewritten(first)
        return span[0]

    def turns(self) -> list[tuple[str, Span]]:
        """Role and characters of each message. Where the template writes a turn differently once
        others follow, it ends with its content and the token behind that."""
        found, start = [], 0
        messages = self.conversation.messages
        for number, message in enumerate(messages, 1):
            end = None
            if number == len(messages):
                end = len(self.text)
            else:
                with contextlib.suppress(DataError):
                    end = self._shared(self._fewer(number).text)
            if end is None or end < start:
                content = message["content"].strip()
                place = self.text.find(content, start)
                end = start if place < 0 else self.template.behind_token(self.text, place, content)
            found.append((message["role"], (start, end)))
            start = end
        return found

    def likely_spans(self) -> list[Span]:
        """The same, to be shown with an error that came before it was known."""
        with contextlib.suppress(DataError):
            return self.answer_spans()
        found, position = [], 0
        for number in self.answers:
            content = self.conversation.messages[number]["content"].strip()
            start = self.text.find(content, position)
            if content and start >= 0:
                position = start + len(content)
                found.append((start, position))
        return found

    def _fewer(self, count: int, *, add_generation_prompt: bool = False) -> Rendering:
        """What the template writes for the first messages alone."""
        messages, tools = self.conversation.messages[:count], self.conversation.tools
        return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def _marked_spans(self) -> list[Span]:
        before, first = self._num_marks, self.answers[0]
        masked = set(self.conversation.masked) & set(self.conversation.answers())
        if not any(number > first for number in masked):
            return self._marks[before(first) :]
        return [
            span
            for answer in self.answers
            for span in self._marks[before(answer) : before(answer + 1)]
        ]

    def _num_marks(self, number: int) -> int:
        """How many marks the template puts into the messages before message `number`."""
        messages = self.conversation.messages
        if all(message["role"] != ASSISTANT for message in messages[:number]):
            return 0
        return len(self._fewer(number).marks)

    def _span(self, answer: int) -> Span | None:
        """None: what the template writes for fewer messages is no beginning of the text."""
        messages, text = self.conversation.messages, self.text
        content = messages[answer]["content"].strip()
        try:
            before = self._fewer(answer, add_generation_prompt=True).text
        except DataError:
            # Templates may look at the first message, and there is none before this answer.
            if answer > 0 or content not in text:
                raise
            before = text[: text.index(content)]
        start = self._shared(before)
        end = len(text) if start is not None else None
        if answer + 1 < len(messages):
            end = self._shared(self._fewer(answer + 1).text)
        if start is None or end is None or end < start:
            return None
        if not self.template.has_generation_prompt and content:
            # The name of the role stands before the answer, and the model is never asked for it.
            place = text.find(content, start, end)
            if place >= 0 and text[start:place].strip():
                start = place
        return start, end

    def _shared(self, fewer: str) -> int | None:
        """How much of the text the rendering of fewer messages is; None: it is no beginning of
        it."""
        if self.text.startswith(fewer):
            return len(fewer)
        # Some templates close the whole conversation with one more token: no part of the turn.
        closing = self.template.closing_token(fewer)
        if closing is not None and self.text.startswith(fewer[: closing[0]]):
            return closing[0]
        return None
