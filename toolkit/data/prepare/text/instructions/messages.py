"""One message of a conversation: who speaks, what is said, and whether the loss counts it.

Only the assistant is trained on. A role that nobody knows would turn an answer into context without
a word, so it is an error.

Data of other trainers mark turns: `weight: 0` (OpenAI, Mistral), `train: false` (Axolotl), `loss:
false` (ms-swift), `masked: true` (torchtune). Which keys mean that is in the config. Any other key
whose name looks like it is refused: ignored, it would train a turn that must not be trained. All
other keys, as `tool_calls`, reach the chat template, in one form whatever file they came from
(`uniform`).
"""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import DataError

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
