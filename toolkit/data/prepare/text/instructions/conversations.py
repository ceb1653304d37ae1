"""From a row of a file to a conversation: a list of messages with a role and a content.

Four shapes of rows are known:

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    prompt_completion   {"prompt": "...", "completion": "..."}, both as text or both as messages
    alpaca              {"instruction": "...", "input": "..." (optional), "output": "..."}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}

Other columns are ignored, but for `tools` (what the assistant may call; a list, or JSON text of
one), of sharegpt `system`, and keys that say that no turn is trained on.

Only the assistant is trained on. A role that nobody knows would turn an answer into context without
a word, so it is an error.

Data of other trainers mark turns: `weight: 0` (OpenAI, Mistral), `train: false` (Axolotl), `loss:
false` (ms-swift), `masked: true` (torchtune). Which keys mean that is in the config. Any other key
whose name looks like it is refused: ignored, it would train a turn that must not be trained. All
other keys, as `tool_calls`, reach the chat template, in one form whatever file they came from
(`uniform`).
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from toolkit.data.prepare.text.reading import at
from toolkit.data.source_config import InstructionsConfig
from toolkit.data.tokens.units import fitting_kind, fitting_settings
from toolkit.errors import DataError

Shape = Literal["messages", "prompt_completion", "alpaca", "sharegpt"]
Message = dict[str, Any]
ASSISTANT = "assistant"
SYSTEM_ROLES = ("system", "developer")
ROLES = (
    *SYSTEM_ROLES, "user", ASSISTANT, "tool", "function", "ipython", "observation",
)  # fmt: skip
"""Roles of messages that the chat templates of the field know."""
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "developer",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "assistant", "function_call"), ASSISTANT),
    **dict.fromkeys(
        ("tool", "tool_response", "observation", "function", "function_response"), "tool"
    ),
}  # fmt: skip
"""`from` of sharegpt's turns, and the role it stands for."""

_LOOKS_LIKE_MASKING = re.compile(
    r"(^|_)(weights?|train(s|ed|ing|able)?|loss|losses|mask(s|ed|ing)?|ignored?)(_|$)"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_OPTIONS = "dataset.instructions.train_keys, mask_keys or ignored_keys"
_EXACT = 2.0**53
"""Whole numbers below it are exact in float64."""


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
    is_written: bool = False
    """Whether `plain` is the whole text already, to which no template is applied."""

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


class Turn(NamedTuple):
    """A message as the chat template gets it."""

    message: Message
    """With `role` and `content`, both text."""
    is_trained: bool | None = None
    """What the turn's own keys say; None: nothing."""


def read_turn(turn: Any, config: InstructionsConfig) -> Turn:
    """A turn of a row; DataError where it cannot be used."""
    if not isinstance(turn, dict):
        raise DataError(f"must have role and content, but is {kind_of(turn)}")
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        hint = "; from and value are read with shape=sharegpt" if "from" in turn else ""
        raise DataError(f"has no role (keys: {', '.join(turn)}){hint}")
    known = [*ROLES, *config.context_roles]
    if role not in known:
        raise DataError(
            f"role {role!r} is not known{_hint(role, known)}; known are "
            f"{', '.join(known)}; correct it, or name a role of your template in "
            "dataset.instructions.context_roles"
        )
    trained = is_trained(turn, config)
    if trained and role != ASSISTANT and config.train_on != "all":
        raise DataError(
            f"asks to be trained on, but its role is {role!r} and "
            f"dataset.instructions.train_on is {config.train_on}; take the key out of such turns, "
            "or set train_on=all"
        )
    # Keys that say whether it is trained on are no part of what is said.
    unsaid = {*config.train_keys, *config.mask_keys} - {*config.ignored_keys}
    unsaid |= {"role", "content"}
    others = uniform({k: v for k, v in turn.items() if k not in unsaid})
    content = turn.get("content")
    if content is None and not others.get("tool_calls"):
        raise DataError(f"has no content (keys: {', '.join(['role', *others])})")
    return Turn({"role": role, "content": _content(content), **others}, trained)


def read_sharegpt_turn(turn: Any, config: InstructionsConfig) -> Turn:
    """The same of a turn with `from` and `value`."""
    if isinstance(turn, dict) and turn.get("from") is not None:
        name = str(turn["from"])
        role = SHAREGPT_ROLES.get(name.lower())
        if role is None and name not in config.context_roles:
            raise DataError(
                f"from {name!r} is not known{_hint(name, list(SHAREGPT_ROLES))}; known "
                f"are {', '.join([*SHAREGPT_ROLES, *config.context_roles])}"
            )
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {**others, "role": role or name, "content": turn.get("value")}
    return read_turn(turn, config)


def is_trained(
    turn: dict[str, Any], config: InstructionsConfig, *, is_row: bool = False
) -> bool | None:
    """Whether `turn` is trained on by its own keys; None: it has none, or they are null. DataError
    for a value that is neither yes nor no, two keys that disagree, or a key that is not in the
    config and looks as if it meant this; but the columns of a row may have any name (`is_row`)."""
    found: dict[str, bool] = {}
    for key, value in turn.items():
        if value is None or key in config.ignored_keys:
            continue
        if key in config.train_keys or key in config.mask_keys:
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise DataError(
                    f"{key} is {value!r}; a turn is trained on (1 or true) or not (0 or "
                    f"false), nothing between; correct it, or change {_OPTIONS}"
                )
            if key in config.train_keys:
                found[key] = bool(value)
            elif value:
                found[key] = False
        elif not is_row:
            refuse_look_alike(key)
    if len(set(found.values())) > 1:
        raise DataError(f"{' and '.join(found)} contradict each other")
    return next(iter(found.values()), None)


def refuse_look_alike(key: str) -> None:
    """Raise DataError when the name of a key that nothing reads looks as if it masked."""
    if _LOOKS_LIKE_MASKING.search(_CAMEL.sub("_", key).lower().replace("-", "_")):
        raise DataError(
            f"the key {key!r} may say that this is not trained on, and nothing reads it; "
            f"take it out of the rows, or name it in {_OPTIONS}"
        )


def uniform(value: Any) -> Any:
    """A nested value of a row in one form; DataError for a number that JSON does not have.

    Columnar files give every object of a column all keys that any of them has (null stands for one
    that is absent), and turn whole numbers into 3.0 where another row has a fraction. Here objects
    have no keys with null, and whole numbers no fraction. The order of keys stays: a model that
    writes an object learns it.
    """
    if isinstance(value, dict):
        return {key: uniform(v) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [uniform(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"holds {value}, which is no number of JSON; repair the row")
        if value.is_integer() and abs(value) < _EXACT:
            return int(value)
    return value


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise DataError(f"content must be text or a list of parts, not {kind_of(content)}")
    texts = []
    for part in content:
        keys = part if isinstance(part, dict) else {"text": part}
        kind, text = keys.get("type") or "text", keys.get("text")
        if kind != "text" or not isinstance(text, str):
            name = kind if kind != "text" else kind_of(text)
            raise DataError(
                f"content has a part of type {name!r}; only text can be trained on, leave "
                "such rows out"
            )
        for key, value in keys.items():
            if value is not None:
                refuse_look_alike(key)
        texts.append(text)
    return "".join(texts)


def _hint(name: str, known: Sequence[str]) -> str:
    lowered = name.strip().lower()
    stands_for = SHAREGPT_ROLES.get(lowered) or next(
        iter(difflib.get_close_matches(lowered, known, n=1)), None
    )
    return f" (did you mean {stands_for!r}?)" if stands_for else ""


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
    if found == ["prompt_completion"] and isinstance(row.get("label"), bool):
        # Undesirable completions would be trained on like the others.
        raise DataError(
            "prompt and completion have a label, true or false, as rows of binary data have; set "
            f"{fitting_settings('binary')}; to train on all of them, take the column out"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"its columns fit the shapes {' and '.join(found)}; set "
            "dataset.instructions.shape to one of them"
        )
    kind = fitting_kind([name for name, value in row.items() if value is not None])
    if kind:
        raise DataError(
            f"columns {', '.join(row)} are those of {kind} data; set {fitting_settings(kind)}"
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
    return finish_conversation(row, read(row, config), config)


def finish_conversation(
    row: dict[str, Any], conversation: Conversation, config: InstructionsConfig
) -> Conversation:
    """`conversation` with what a row says beside it: tools, and keys that mask all of it."""
    conversation = conversation._replace(tools=_tools(row.get("tools")))
    if config.system_prompt is not None:
        conversation = _with_system_prompt(conversation, config.system_prompt)
    if is_trained(row, config, is_row=True) is False:
        conversation = conversation._replace(masked=tuple(range(len(conversation.messages))))
    return conversation


def _messages(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    return conversation_of(turns_of(row, "messages", config))


def _prompt_completion(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return single_turn(prompt, completion, (prompt, completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        context = turns_of(row, "prompt", config)
        conversation = conversation_of(context + turns_of(row, "completion", config))
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
    return single_turn(prompt, output, (plain, output))


def _sharegpt(row: dict[str, Any], config: InstructionsConfig) -> Conversation:
    if not isinstance(row["conversations"], list):
        raise DataError(f"conversations must be a list, not {kind_of(row['conversations'])}")
    turns = turns_of(row, "conversations", config, read=read_sharegpt_turn)
    system = row.get("system")
    if isinstance(system, str) and system and not _has_system([t.message for t in turns]):
        turns.insert(0, Turn({"role": "system", "content": system}))
    return conversation_of(turns)


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


def turns_of(
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


def conversation_of(turns: list[Turn]) -> Conversation:
    masked = tuple(number for number, turn in enumerate(turns) if turn.is_trained is False)
    return Conversation([turn.message for turn in turns], masked=masked)


def single_turn(prompt: str, answer: str, plain: tuple[str, str]) -> Conversation:
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
