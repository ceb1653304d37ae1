"""From a row of a file to a conversation: a list of messages with a role and a content.

Four shapes of rows are known:

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    prompt_completion   {"prompt": "...", "completion": "..."}, both as text or both as messages
    alpaca              {"instruction": "...", "input": "..." (optional), "output": "..."}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}

Other columns are ignored, but for `tools` (what the assistant may call; a list, or JSON text of
one), of sharegpt `system`, and keys that say that no turn is trained on.
"""

import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from toolkit.data.prepare.text.instructions.messages import (
    ASSISTANT,
    SYSTEM_ROLES,
    Message,
    Turn,
    is_trained,
    kind_of,
    read_sharegpt_turn,
    read_turn,
    uniform,
)
from toolkit.data.prepare.text.reading import at
from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import DataError

Shape = Literal["messages", "prompt_completion", "alpaca", "sharegpt"]


class Conversation(NamedTuple):
    """What a row says, whatever its shape."""

    messages: list[Message]
    """Each with `role` and `content`, both text."""
    tools: list[Any] | None = None
    """What the assistant may call, as JSON schemas."""
    num_context: int = 0
    """Messages at the start that are never trained on: the prompt, where it is a list."""
    plain: tuple[str, str] | None = None
    """Prompt and completion, for tokenizers without a chat template; None: a template is needed."""
    masked: tuple[int, ...] = ()
    """Messages that are not trained on, because their rows say so."""

    def answers(self) -> list[int]:
        """Numbers of the messages that can be trained on, were none masked: what the assistant
        says. A message without text and calls teaches nothing."""
        return [
            number
            for number, message in enumerate(self.messages)
            if number >= self.num_context
            and message["role"] == ASSISTANT
            and (message["content"].strip() or message.get("tool_calls"))
        ]


def shape_of(row: dict[str, Any], config: InstructionsConfig) -> Shape:
    """The shape that is asked for, or the one that the row's columns tell; DataError where they
    tell none, or several."""
    if config.shape != "auto":
        return config.shape
    found: list[Shape] = [
        shape
        for shape, (columns, _) in _SHAPES.items()
        if all(row.get(column) is not None for column in columns)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"its columns fit the shapes {' and '.join(found)}; set "
            "dataset.instructions.shape to one of them"
        )
    known = ", ".join(f"{shape} ({' + '.join(columns)})" for shape, (columns, _) in _SHAPES.items())
    raise DataError(
        f"columns {', '.join(row) or 'none'} fit no shape of instruction data; known are "
        f"{known}; rename the columns, or set dataset.instructions to null for plain text"
    )


def read_conversation(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    """The conversation of a row, with `system_prompt` put before it where it has none. DataError
    where it does not have the shape, or holds something else than text."""
    shape = shape_of(row, config)
    columns, read = _SHAPES[shape]
    for column in columns:
        if row.get(column) is None:
            raise DataError(
                f"has no column {column!r}, which dataset.instructions.shape={shape} "
                f"needs (there are {', '.join(row) or 'none'})"
            )
    conversation = read(row, config)._replace(tools=_tools(row.get("tools")))
    if config.system_prompt is not None:
        conversation = _with_system_prompt(conversation, config.system_prompt)
    if is_trained(row, config, is_row=True) is False:
        conversation = conversation._replace(masked=tuple(range(len(conversation.messages))))
    return conversation


def _messages(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    return _conversation(_turns(row, "messages", config))


def _prompt_completion(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _single_turn(prompt, completion, (prompt, completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _turns(row, "prompt", config)
        conversation = _conversation(context + _turns(row, "completion", config))
        return conversation._replace(num_context=len(context))
    raise DataError(
        f"prompt is {kind_of(prompt)} and completion is {kind_of(completion)}; give both as text "
        "or both as lists of messages"
    )


def _alpaca(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    texts = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{name} must be text, not {kind_of(text)}")
    instruction, given, output = texts["instruction"], texts["input"], texts["output"]
    # The form that Alpaca's own models were trained with, without its opening sentence (which may
    # be given as system_prompt).
    middle = f"### Input:\n{given}\n\n" if given else ""
    plain = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return _single_turn(prompt, output, (plain, output))


def _sharegpt(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    if not isinstance(row["conversations"], list):
        raise DataError(f"conversations must be a list, not {kind_of(row['conversations'])}")
    turns = _turns(row, "conversations", config, read=read_sharegpt_turn)
    system = row.get("system")
    if isinstance(system, str) and system and not _has_system([t.message for t in turns]):
        turns.insert(0, Turn({"role": "system", "content": system}))
    return _conversation(turns)


_SHAPES: dict[
    Shape,
    tuple[tuple[str, ...], Callable[[dict[str, Any], InstructionsConfig], Conversation]],
] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
}
"""The columns that each shape needs, and what reads them."""


def _turns(
    row: dict[str, Any],
    column: str,
    config: InstructionsConfig,
    *,
    read: Callable[[Any, InstructionsConfig], Turn] = read_turn,
) -> list[Turn]:
    if not isinstance(row[column], list):
        raise DataError(f"{column}: must be a list of messages, not {kind_of(row[column])}")
    turns = []
    for number, turn in enumerate(row[column]):
        with at(f"{column}[{number}]"):
            turns.append(read(turn, config))
    return turns


def _conversation(turns: list[Turn]) -> Conversation:
    masked = tuple(number for number, turn in enumerate(turns) if turn.is_trained is False)
    return Conversation([turn.message for turn in turns], masked=masked)


def _single_turn(prompt: str, answer: str, plain: tuple[str, str]) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": answer}]
    return Conversation(messages, num_context=1, plain=plain)


def _tools(found: Any) -> list[Any] | None:
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except ValueError as error:
            raise DataError(f"tools is not valid JSON: {error}") from None
    if not found:
        return None
    if not isinstance(found, list):
        raise DataError(f"tools must be a list, not {kind_of(found)}")
    with at("tools"):
        tools: list[Any] = uniform(found)
    return tools


def _with_system_prompt(conversation: Conversation, prompt: str) -> Conversation:
    plain = conversation.plain
    if not conversation.messages or _has_system(conversation.messages):
        return conversation
    return conversation._replace(
        messages=[{"role": "system", "content": prompt}, *conversation.messages],
        num_context=conversation.num_context + bool(conversation.num_context),
        masked=tuple(number + 1 for number in conversation.masked),
        plain=None if plain is None else (f"{prompt}\n\n{plain[0]}", plain[1]),
    )


def _has_system(messages: list[Message]) -> bool:
    return any(message["role"] in SYSTEM_ROLES for message in messages)
