"""What is wrong with instruction data, said with one sample of it.

A sample is a rendered row with `[[` and `]]` around what the loss counts.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.instructions.conversations import ASSISTANT, Conversation, Message
from toolkit.data.prepare.text.instructions.template import ChatTemplate, Span
from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import DataError
from toolkit.wording import count

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold what the assistant thinks before it answers."""
NO_TARGET = "no target"
"""Reason in `Manifest.filtered_documents`: a row in which nothing can be trained on."""

SHOWN_PIECES = 12
SHOWN_CHARACTERS = 120
SHORT = 12
"""Characters of a message that templates may write of their own accord, as `assistant`."""


def excerpt(text: str, targets: Sequence[Span]) -> str:
    """The sample for an error: shortened, on one line, targets between `[[` and `]]`."""
    pieces, position = [], 0
    for start, end in [*targets, (len(text), len(text))]:
        if position < start:
            pieces.append(_shortened(text[position:start]))
        if start < end:
            pieces.append(f"[[{_shortened(text[start:end])}]]")
        position = end
    if len(pieces) > SHOWN_PIECES:
        half = SHOWN_PIECES // 2
        pieces = [*pieces[:half], " ... ", *pieces[-half:]]
    return "".join(pieces)


def check_nothing_dropped(messages: Sequence[Message], text: str) -> None:
    """Raise DataError when the content of a message does not occur in the rendered text. White
    space may differ. Of what the assistant says before the last message, reasoning at its
    start may be gone (all up to a tag like `</think>`): many templates drop it on purpose.
    """
    squeezed: str | None = None
    counts: dict[str, int] = {}
    for number, message in enumerate(messages):
        content = message["content"].strip()
        counts[content] = counts.get(content, 0) + 1
        if not content or text.count(content) >= counts[content]:
            continue
        if squeezed is None:
            squeezed = _squeeze(text)
        wanted = _squeeze(content)
        if squeezed.count(wanted) >= counts[content]:
            continue
        # What tools give is often written as JSON.
        escaped = [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        if any(other != content and text.count(other) >= counts[content] for other in escaped):
            continue
        if message["role"] == ASSISTANT and number < len(messages) - 1:
            answer = _squeeze(_without_reasoning(content))
            if answer and answer in squeezed:
                continue
        raise dropped_text(number, message)


def check_calls(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Raise DataError when a tool call does not reach the rendered `text`. The name of a tool
    stands in the list of tools too: each call gets a name of its own, and all are looked for."""
    marks: dict[str, tuple[int, str]] = {}
    changed = []
    for number, message in enumerate(conversation.messages):
        calls = message.get("tool_calls")
        if isinstance(calls, list) and any(_tool_name(call) for call in calls):
            marked = []
            for call in calls:
                name, mark = _tool_name(call), template.unused_mark(text, len(marks))
                if name:
                    marks[mark] = (number, name)
                marked.append(_renamed(call, mark))
            message = {**message, "tool_calls": marked}
        changed.append(message)
    if not marks:
        return
    try:
        written = template.render(changed, conversation.tools).text
    except DataError:  # it looks at names: they must be right
        written = text
        marks = {name: (number, name) for number, name in marks.values()}
    for mark, (number, name) in marks.items():
        if mark not in written and json.dumps(mark)[1:-1] not in written:
            raise DataError(
                f"the chat template drops the tool call of message {number}; take a template "
                f"that knows tools, or leave such rows out: {name!r} is missing"
            )


def check_reasoning(
    template: ChatTemplate, messages: Sequence[Message], text: str, ignored_keys: Sequence[str]
) -> None:
    """Raise DataError when reasoning that has a key of its own does not reach the rendered `text`.
    Of earlier turns it may be gone where the template knows the key: it drops it on purpose."""
    squeezed: str | None = None
    for number, message in enumerate(messages):
        for key in REASONING_KEYS:
            value = message.get(key)
            if not isinstance(value, str) or not value.strip() or key in ignored_keys:
                continue
            squeezed = _squeeze(text) if squeezed is None else squeezed
            is_last = number == len(messages) - 1
            if key in template.text and (not is_last or _squeeze(value) in squeezed):
                continue
            raise DataError(
                f"the chat template drops the {key} of message {number}; take one that writes it, "
                "take the key out of the rows, or name it in dataset.instructions.ignored_keys"
            )


def check_tools(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Raise DataError when a tool that the row offers does not reach the rendered `text`."""
    tools = conversation.tools
    if not tools:
        return
    dropped = "tools" not in template.text
    if not dropped:
        with contextlib.suppress(DataError):  # it wants tools: it reads them
            dropped = template.render(conversation.messages).text == text
    missing = [name for name in map(_tool_name, tools) if name is not None and name not in text]
    if dropped or missing:
        what = f"tool {missing[0]!r}" if missing else "tools"
        raise DataError(
            f"the chat template drops the {what} of the row; take one that writes `tools` (of "
            "several with names, `tool_use` is taken for such rows), or leave `tools` out of them"
        )


def is_ambiguous(messages: Sequence[Message], text: str, others: Sequence[str]) -> bool:
    """Whether a message may occur in the rendered text only because other text holds the same: not
    when all messages stand in it one after the other, and none is in `others` (the template's own
    text, tools) or so short that a role or a date could hold it."""
    position = 0
    for message in messages:
        content = message["content"].strip()
        if not content:
            continue
        place = text.find(content, position)
        if place < 0 or len(content) <= SHORT or any(content in other for other in others):
            return True
        position = place + len(content)
    return False


def dropped_text(number: int, message: Message) -> DataError:
    """The error for message `number`, which the template leaves out."""
    return DataError(
        f"the chat template drops text: message {number} ({message['role']}) does not occur in "
        "what it writes; change the template, or leave such messages out: "
        f"{_shortened(message['content'].strip())!r} is missing"
    )


def check_marks(marked: Sequence[str], conversation: Conversation, answers: Sequence[int]) -> None:
    """Raise DataError when what a template marks does not hold the answers, or holds what others
    say; reasoning before an answer may stand outside the marks."""
    squeezed = _squeeze("".join(marked))
    said = _squeeze("".join(row_texts([m for m in conversation.messages if _is_assistant(m)])))
    for number, message in enumerate(conversation.messages):
        content = _squeeze(message["content"])
        if _is_assistant(message) or len(content) <= SHORT or content in said:
            continue
        if content in squeezed:
            raise DataError(
                f"the chat template marks message {number} ({message['role']}) as what the "
                "assistant says; put {% generation %} and {% endgeneration %} around the "
                "assistant's turns alone"
            )
    for answer in answers:
        content = conversation.messages[answer]["content"]
        if _squeeze(_without_reasoning(content)) not in squeezed:
            raise DataError(
                "the chat template does not mark all of what the assistant says: message "
                f"{answer} is not between {{% generation %}} and {{% endgeneration %}}; put them "
                "around it, and outside of macros"
            )


def has_stop(said: str, conversation: Conversation, answer: int | None) -> bool:
    """Whether something but white space follows what message `answer` says (None: any of them) in
    `said`, the part of the rendered text that is trained on for it."""
    said = _squeeze(said)
    numbers = conversation.answers() if answer is None else [answer]
    for number in numbers:
        content = _squeeze(conversation.messages[number]["content"])
        if content and said.endswith(content) and said.count(content) == 1:
            return False
    return bool(said)


def check_targets(
    config: InstructionsConfig,
    *,
    num_tokens: int,
    num_targets: int | None,
    filtered: Mapping[str, int],
    sample: Callable[[], tuple[str, int | None]],
) -> None:
    """Raise DataError unless some of a data set's tokens, not all and not none, are targets
    (`num_targets` None: all are). `sample` gives one rendered row, and the number of an answer in
    it that is masked where no other is trained on."""
    left_out = filtered.get(NO_TARGET, 0)
    if num_targets == 0 or (num_tokens == 0 and left_out):
        shown, masked = sample()
        why, advice = "", "check the roles in the rows, and dataset.instructions.shape and train_on"
        if left_out:
            rows = f"{count(left_out, 'row')} {'has' if left_out == 1 else 'have'}"
            why = f"{rows} no answer of the assistant; "
            if masked is not None:
                why = f"{rows} no answer of the assistant that is trained on; "
                advice = (
                    f"in the first row, message {masked} says that it is not (weight 0, or "
                    "trainable false, or the like): take that out of what should be trained on"
                )
        raise DataError(
            f"dataset.instructions: the loss would count no token of this data: {why}{advice}; one "
            f"row, targets in [[ ]]: {shown}"
        )
    if config.train_on != "all" and num_targets in (None, num_tokens) and num_tokens:
        raise DataError(
            "dataset.instructions: the loss would count every token of this data, prompts "
            f"included, though train_on is {config.train_on}; check the rows and the chat "
            "template, or set dataset.instructions.train_on=all; one row, targets in [[ ]]: "
            f"{sample()[0]}"
        )


def _is_assistant(message: Message) -> bool:
    return bool(message["role"] == ASSISTANT)


def _renamed(call: Any, mark: str) -> Any:
    """`call` with `mark` behind the name of its tool."""
    if not _tool_name(call):
        return call
    if isinstance(call.get("function"), dict):
        inner = call["function"]
        return {**call, "function": {**inner, "name": f"{inner['name']}{mark}"}}
    return {**call, "name": f"{call['name']}{mark}"}


def _tool_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _without_reasoning(content: str) -> str:
    """What follows the last closing tag, as `</think>` or `[/THINK]`."""
    for end, start in ((">", "</"), ("]", "[/")):
        opened = content.rfind(start)
        closed = content.find(end, opened)
        if opened >= 0 and closed >= 0:
            return content[closed + 1 :]
    return content


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _shortened(text: str) -> str:
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS * 2 // 3]} ... {text[-SHOWN_CHARACTERS // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
