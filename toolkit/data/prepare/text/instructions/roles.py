"""Who speaks in a conversation: the roles that are known, and what a misspelled one stands for.

Only the assistant is trained on. A role that nobody knows would turn an answer into context without
a word, so it is an error.
"""

import difflib
from collections.abc import Sequence

from toolkit.errors import DataError

ASSISTANT = "assistant"
SYSTEM_ROLES = ("system", "developer")
ROLES = (
    *SYSTEM_ROLES, "user", ASSISTANT, "tool", "function", "ipython", "observation",
)  # fmt: skip
"""Roles of messages that the chat templates of the field know."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "assistant": ASSISTANT,
    "function_call": ASSISTANT,
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""`from` of sharegpt's turns, and the role it stands for."""


def check_role(role: str, others: Sequence[str], where: str) -> None:
    """Raise DataError for a role that is neither known nor in `others`; names the nearest one."""
    if role in ROLES or role in others:
        return
    raise DataError(
        f"{where}: role {role!r} is not known{_hint(role, [*ROLES, *others])}; known are "
        f"{', '.join([*ROLES, *others])}; correct it, or name a role of your template in "
        "dataset.instructions.context_roles"
    )


def sharegpt_role(name: str, others: Sequence[str], where: str) -> str:
    """The role that `from` of a turn stands for.

    Raises:
        DataError: it is not known.
    """
    role = SHAREGPT_ROLES.get(name.lower())
    if role is None and name in others:
        role = name
    if role is None:
        raise DataError(
            f"{where}: from {name!r} is not known{_hint(name, list(SHAREGPT_ROLES))}; known are "
            f"{', '.join([*SHAREGPT_ROLES, *others])}"
        )
    return role


def _hint(name: str, known: Sequence[str]) -> str:
    lowered = name.strip().lower()
    stands_for = SHAREGPT_ROLES.get(lowered) or next(
        iter(difflib.get_close_matches(lowered, known, n=1)), None
    )
    return f" (did you mean {stands_for!r}?)" if stands_for else ""
