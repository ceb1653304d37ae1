"""Which characters of a rendered conversation belong to which answer.

A template with `{% generation %}` marks says it itself. Of any other, an answer is what the
template writes for the conversation up to it, less what it writes for the conversation before it
with the generation prompt: what a model sees when it is its turn, and what it should say then. That
holds only where the template never takes back what it wrote for fewer messages; where it does (as
those that drop the reasoning of earlier turns), it is an error, not a guess.
"""

from toolkit.data.prepare.text.instructions.checks import check_marks
from toolkit.data.prepare.text.instructions.roles import ASSISTANT
from toolkit.data.prepare.text.instructions.shapes import Conversation
from toolkit.data.prepare.text.instructions.template import ChatTemplate, Rendering, Span
from toolkit.errors import DataError


def answer_spans(
    template: ChatTemplate, conversation: Conversation, rendered: Rendering, answers: list[int]
) -> list[Span]:
    """Where each of the messages `answers` stands, its end-of-turn token included.

    With marks there may be several spans for a message, or none.

    Raises:
        DataError: the template writes a turn differently once others follow.
    """
    if template.has_marks:
        spans = _marked_spans(template, conversation, rendered, answers)
        check_marks([rendered.text[start:end] for start, end in spans], conversation, answers)
        return spans
    spans = []
    for answer in answers:
        span = _span(template, conversation, rendered.text, answer)
        if span is None:
            raise _rewrites(answer, is_last=answer == answers[-1])
        spans.append(span)
    return spans


def _marked_spans(
    template: ChatTemplate, conversation: Conversation, rendered: Rendering, answers: list[int]
) -> list[Span]:
    first, others = answers[0], set(conversation.masked)
    if not any(number > first for number in others & set(conversation.answers())):
        return rendered.marks[_marks_before(template, conversation, first) :]
    spans = []
    for answer in answers:
        start = _marks_before(template, conversation, answer)
        spans += rendered.marks[start : _marks_before(template, conversation, answer + 1)]
    return spans


def _marks_before(template: ChatTemplate, conversation: Conversation, number: int) -> int:
    """How many marks the template puts into the messages before message `number`."""
    before = conversation.messages[:number]
    if all(message["role"] != ASSISTANT for message in before):
        return 0
    return len(template.render(before, conversation.tools).marks)


def _span(
    template: ChatTemplate, conversation: Conversation, text: str, answer: int
) -> Span | None:
    """None: what the template writes for fewer messages is no beginning of `text`."""
    messages, tools = conversation.messages, conversation.tools
    content = messages[answer]["content"].strip()
    try:
        before = template.render(messages[:answer], tools, add_generation_prompt=True).text
    except DataError:
        # Templates may look at the first message, and there is none before this answer.
        if answer > 0 or content not in text:
            raise
        before = text[: text.index(content)]
    start = _shared(template, text, before)
    end = len(text) if start is not None else None
    if answer + 1 < len(messages):
        end = _shared(template, text, template.render(messages[: answer + 1], tools).text)
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


def _rewrites(answer: int, *, is_last: bool) -> DataError:
    advice = "" if is_last else "set dataset.instructions.train_on=last_assistant, or "
    return DataError(
        f"the chat template writes message {answer} (assistant) or what stands before it "
        "differently once the answer or other messages follow, so what the model would see and say "
        f"at that point is not in the text; {advice}give a chat_template that leaves earlier text "
        "as it was, or marks answers with {% generation %}"
    )
