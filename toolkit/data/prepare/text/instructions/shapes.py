"""From a row of a file to a conversation: a list of messages with a role and a content.

Four shapes of rows are known:

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    prompt_completion   {"prompt": "...", "completion": "..."}, both as text or both as messages
    alpaca              {"instruction": "...", "input": "..." (optional), "output": "..."}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}

Other columns are ignored, but for `tools` (what the assistant may call; a list, or JSON text of
one), of sharegpt `system`, and keys that say that no turn is trained on. Keys of a
message that say whether it is trained on are read here (`turn_keys.py`); others, as `tool_calls`,
reach the chat template, without nulls (`values.py`).
"""

import json
from typing import Any, Literal, NamedTuple

from toolkit.data.prepare.text.instructions.roles import (
    ASSISTANT,
    SYSTEM_ROLES,
    check_role,
    sharegpt_role,
)
from toolkit.data.prepare.text.instructions.turn_keys import (
    is_row_trained,
    is_trained,
    refuse_look_alike,
    without_turn_keys,
)
from toolkit.data.prepare.text.instructions.values import uniform
from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import DataError

Message = dict[str, Any]
Shape = Literal["messages", "prompt_completion", "alpaca", "sharegpt"]

_COLUMNS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}


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


def shape_of(row: dict[str, Any], config: InstructionsConfig, where: str) -> Shape:
    """The shape that is asked for, or the one that the row's columns tell.

    Raises:
        DataError: the columns tell none, or several.
    """
    if config.shape != "auto":
        return config.shape
    found = [s for s, columns in _COLUMNS.items() if all(row.get(c) is not None for c in columns)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{where}: its columns fit the shapes {' and '.join(found)}; set "
            "dataset.instructions.shape to one of them"
        )
    known = ", ".join(f"{shape} ({' + '.join(columns)})" for shape, columns in _COLUMNS.items())
    raise DataError(
        f"{where}: columns {', '.join(row) or 'none'} fit no shape of instruction data; known are "
        f"{known}; rename the columns, or set dataset.instructions to null for plain text"
    )


def read_conversation(row: dict[str, Any], config: InstructionsConfig, where: str) -> Conversation:
    """The conversation of a row, with `system_prompt` put before it where it has none.

    Args:
        where: names the row in errors.

    Raises:
        DataError: the row does not have the shape, or holds something else than text.
    """
    shape = shape_of(row, config, where)
    for column in _COLUMNS[shape]:
        if row.get(column) is None:
            raise DataError(
                f"{where}: has no column {column!r}, which dataset.instructions.shape={shape} "
                f"needs (there are {', '.join(row) or 'none'})"
            )
    if shape == "messages":
        conversation = _conversation(_turns(row["messages"], config, f"{where}: messages"))
    elif shape == "sharegpt":
        conversation = _conversation(_sharegpt(row, config, where))
    elif shape == "alpaca":
        conversation = _alpaca(row, where)
    else:
        conversation = _prompt_completion(row, config, where)
    conversation = conversation._replace(tools=_tools(row.get("tools"), where))
    if config.system_prompt is not None:
        conversation = _with_system_prompt(conversation, config.system_prompt)
    if is_row_trained(row, config, where) is False:
        conversation = conversation._replace(masked=tuple(range(len(conversation.messages))))
    return conversation


class _Turn(NamedTuple):
    message: Message
    is_trained: bool | None = None
    """What the turn's own keys say; None: nothing."""


def _conversation(turns: list[_Turn], num_context: int = 0) -> Conversation:
    masked = tuple(number for number, turn in enumerate(turns) if turn.is_trained is False)
    return Conversation([turn.message for turn in turns], num_context=num_context, masked=masked)


def _prompt_completion(row: dict[str, Any], config: InstructionsConfig, where: str) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _single_turn(prompt, completion, (prompt, completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _turns(prompt, config, f"{where}: prompt")
        answer = _turns(completion, config, f"{where}: completion")
        return _conversation(context + answer, num_context=len(context))
    raise DataError(
        f"{where}: prompt is {_kind(prompt)} and completion is {_kind(completion)}; give both as "
        "text or both as lists of messages"
    )


def _alpaca(row: dict[str, Any], where: str) -> Conversation:
    texts = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: {name} must be text, not {_kind(text)}")
    instruction, given, output = texts["instruction"], texts["input"], texts["output"]
    # The form that Alpaca's own models were trained with, without its opening sentence (which may
    # be given as system_prompt).
    middle = f"### Input:\n{given}\n\n" if given else ""
    plain = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return _single_turn(prompt, output, (plain, output))


def _single_turn(prompt: str, answer: str, plain: tuple[str, str]) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": answer}]
    return Conversation(messages, num_context=1, plain=plain)


def _sharegpt(row: dict[str, Any], config: InstructionsConfig, where: str) -> list[_Turn]:
    found = row["conversations"]
    if not isinstance(found, list):
        raise DataError(f"{where}: conversations must be a list, not {_kind(found)}")
    turns = []
    for number, turn in enumerate(found):
        here = f"{where}: conversations[{number}]"
        if isinstance(turn, dict) and turn.get("from") is not None:
            role = sharegpt_role(str(turn["from"]), config.context_roles, here)
            others = {key: value for key, value in turn.items() if key not in ("from", "value")}
            turn = {**others, "role": role, "content": turn.get("value")}
        turns.append(_turn(turn, config, here))
    system = row.get("system")
    if isinstance(system, str) and system and not _has_system([t.message for t in turns]):
        turns.insert(0, _Turn({"role": "system", "content": system}))
    return turns


def _turns(found: Any, config: InstructionsConfig, where: str) -> list[_Turn]:
    if not isinstance(found, list):
        raise DataError(f"{where}: must be a list of messages, not {_kind(found)}")
    return [_turn(turn, config, f"{where}[{number}]") for number, turn in enumerate(found)]


def _turn(turn: Any, config: InstructionsConfig, where: str) -> _Turn:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: must have role and content, but is {_kind(turn)}")
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        hint = "; from and value are read with shape=sharegpt" if "from" in turn else ""
        raise DataError(f"{where}: has no role (keys: {', '.join(turn)}){hint}")
    check_role(role, config.context_roles, where)
    trained = is_trained(turn, config, where)
    if trained and role != ASSISTANT and config.train_on != "all":
        raise DataError(
            f"{where}: asks to be trained on, but its role is {role!r} and "
            f"dataset.instructions.train_on is {config.train_on}; take the key out of such turns, "
            "or set train_on=all"
        )
    content = turn.get("content")
    others = {key: value for key, value in turn.items() if key not in ("role", "content")}
    others = uniform(without_turn_keys(others, config), where)
    if content is None and not others.get("tool_calls"):
        raise DataError(f"{where}: has no content (keys: {', '.join(['role', *others])})")
    return _Turn({"role": role, "content": _text(content, where), **others}, trained)


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: content must be text or a list of parts, not {_kind(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = (part.get("type") or "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            name = kind if kind != "text" else _kind(text)
            raise DataError(
                f"{where}: content has a part of type {name!r}; only text can be trained on, leave "
                "such rows out"
            )
        for key, value in part.items() if isinstance(part, dict) else ():
            if value is not None:
                refuse_look_alike(key, where)
        texts.append(text)
    return "".join(texts)


def _tools(found: Any, where: str) -> list[Any] | None:
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except ValueError as error:
            raise DataError(f"{where}: tools is not valid JSON: {error}") from None
    if not found:
        return None
    if not isinstance(found, list):
        raise DataError(f"{where}: tools must be a list, not {_kind(found)}")
    tools: list[Any] = uniform(found, f"{where}: tools")
    return tools


def _with_system_prompt(conversation: Conversation, prompt: str) -> Conversation:
    plain = conversation.plain
    if plain is not None:
        plain = (f"{prompt}\n\n{plain[0]}", plain[1])
    if not conversation.messages or _has_system(conversation.messages):
        return conversation
    return conversation._replace(
        messages=[{"role": "system", "content": prompt}, *conversation.messages],
        num_context=conversation.num_context + bool(conversation.num_context),
        masked=tuple(number + 1 for number in conversation.masked),
        plain=plain,
    )


def _has_system(messages: list[Message]) -> bool:
    return any(message["role"] in SYSTEM_ROLES for message in messages)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), type(value).__name__)
