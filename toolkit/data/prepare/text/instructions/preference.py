"""From a row of preference or binary data to the conversations it compares.

The shapes are those of TRL, each with texts or with lists of messages:

    preference   {"prompt": ..., "chosen": ..., "rejected": ...}
                 {"chosen": ..., "rejected": ...}   the prompt is what both begin with
    binary       {"prompt": ..., "completion": ..., "label": true or false}

Where the sides are lists of messages and `prompt` is text, the prompt is what both sides begin
with, as in TRL; the text must stand in it. Other columns are ignored, but for `tools` and keys that
say that a turn is not trained on.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.data.prepare.text.instructions.checks import SHORT, excerpt
from toolkit.data.prepare.text.instructions.conversations import (
    ASSISTANT,
    Conversation,
    Turn,
    conversation_of,
    finish_conversation,
    kind_of,
    single_turn,
    turns_of,
)
from toolkit.data.source_config import InstructionsConfig, RowKind
from toolkit.data.tokens.units import COLUMNS, TRAINED_BY, fitting_kind, fitting_settings
from toolkit.errors import DataError

EQUAL_SIDES = "equal sides"
"""Reason in `Manifest.filtered_documents`: chosen and rejected are the same."""
EMPTY_ANSWER = "empty answer"
"""...: a side says nothing."""


class Comparison(NamedTuple):
    """What a row says."""

    sides: tuple[Conversation, ...]
    """The chosen and the rejected conversation with one prompt; of binary rows the only one. The
    prompt is the first `num_context` messages."""
    is_desirable: bool = True
    """The label of a binary row."""
    left_out: str | None = None
    """Why the row cannot be trained on, as counted in `Manifest.filtered_documents`."""


def read_preference(row: dict[str, Any], config: InstructionsConfig) -> Comparison:
    """The comparison of a row with `chosen` and `rejected`; DataError where the row has another
    shape, or the prompts of its sides differ."""
    _check_columns(row, "preference")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if chosen == rejected:
        return Comparison((), left_out=EQUAL_SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _implicit_texts(row, chosen, rejected, config)
        sides = _explicit_texts(row, prompt, {"chosen": chosen, "rejected": rejected}, config)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        turns = {name: turns_of(row, name, config) for name in ("chosen", "rejected")}
        if not all(turns.values()):
            return Comparison((), left_out=EMPTY_ANSWER)
        if isinstance(prompt, list):
            sides = _explicit_turns(row, turns_of(row, "prompt", config), turns, config)
        else:
            sides = _implicit_turns(row, prompt, turns, config)
    else:
        raise DataError(
            f"chosen is {kind_of(chosen)} and rejected is {kind_of(rejected)}; give both as text "
            "or both as lists of messages"
        )
    return Comparison(sides, left_out=_empty(sides))


def read_binary(row: dict[str, Any], config: InstructionsConfig) -> Comparison:
    """The prompt, completion and label of a row; DataError where it has another shape."""
    _check_columns(row, "binary")
    prompt, completion, label = row["prompt"], row["completion"], row["label"]
    if not isinstance(label, bool):
        raise DataError(
            f"label is {label!r}, and must be true (the completion is desirable) or false; write "
            "it as a boolean"
        )
    if isinstance(completion, str):
        sides = _explicit_texts(row, prompt, {"completion": completion}, config)
    elif isinstance(completion, list) and isinstance(prompt, list):
        turns = {"completion": turns_of(row, "completion", config)}
        sides = _explicit_turns(row, turns_of(row, "prompt", config), turns, config)
    else:
        raise _mixed_kinds(prompt, "completion", completion)
    return Comparison(sides, is_desirable=label, left_out=_empty(sides))


READERS: dict[RowKind, Callable[[dict[str, Any], InstructionsConfig], Comparison]] = {
    "preference": read_preference,
    "binary": read_binary,
}


def shown(row: Mapping[str, Any]) -> str:
    """A row for a message: its prompt and answers, shortened, on one line."""
    found = []
    for name in ("prompt", "chosen", "rejected", "completion", "label"):
        value = row.get(name)
        if isinstance(value, list):
            turns = [turn if isinstance(turn, dict) else {} for turn in value]
            value = " ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
        if value is not None:
            found.append(f"{name}: {excerpt(str(value), [])!r}")
    return "{" + ", ".join(found) + "}"


def _check_columns(row: dict[str, Any], kind: RowKind) -> None:
    for column in COLUMNS[kind]:
        if row.get(column) is not None:
            continue
        if column in row:
            raise DataError(
                f"{column} is null, and dataset.instructions.kind={kind} needs it; fill it in, or "
                f"leave the row out: {shown(row)}"
            )
        other = fitting_kind([name for name, value in row.items() if value is not None])
        settings = (
            f"dataset.instructions.kind to conversations, and {TRAINED_BY[None]}"
            if other is None
            else fitting_settings(other)
        )
        whose = "as it is no preference data" if other is None else f"as its columns are of {other}"
        raise DataError(
            f"has no column {column!r}, which dataset.instructions.kind={kind} needs (there are "
            f"{', '.join(row) or 'none'}); {whose}, set {settings}; or rename the columns"
        )


def _explicit_texts(
    row: dict[str, Any], prompt: Any, sides: Mapping[str, str], config: InstructionsConfig
) -> tuple[Conversation, ...]:
    if not isinstance(prompt, str):
        name, side = next(iter(sides.items()))
        raise _mixed_kinds(prompt, name, side)
    if not prompt.strip():
        raise DataError(f"prompt is empty; fill it in, or leave the row out: {shown(row)}")
    if len(sides) > 1 and len(prompt) > SHORT:
        repeats = all(side.startswith(prompt) for side in sides.values())
        if repeats:
            raise _repeated_prompt(row, sides)
    return tuple(
        finish_conversation(row, single_turn(prompt, side, (prompt, side)), config)
        for side in sides.values()
    )


def _implicit_texts(
    row: dict[str, Any], chosen: str, rejected: str, config: InstructionsConfig
) -> Comparison:
    """As `trl.data_utils.extract_prompt`: the common beginning, a space at its end aside."""
    cut = _common_length(chosen, rejected)
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    prompt = chosen[:cut]
    if not prompt.strip():
        raise _different_prompts(row, "the texts have no common beginning")
    # Such text has its turns written out already: no template goes around it.
    sides = tuple(
        finish_conversation(
            row, single_turn(prompt, side[cut:], (prompt, side[cut:])), config
        )._replace(is_written=True)
        for side in (chosen, rejected)
    )
    return Comparison(sides, left_out=_empty(sides))


def _explicit_turns(
    row: dict[str, Any],
    prompt: list[Turn],
    sides: Mapping[str, list[Turn]],
    config: InstructionsConfig,
) -> tuple[Conversation, ...]:
    if not prompt:
        raise DataError(f"prompt has no messages; fill it in, or leave the row out: {shown(row)}")
    beginning = _messages(prompt)
    again = [name for name, turns in sides.items() if _messages(turns[: len(prompt)]) == beginning]
    if again:
        raise _repeated_prompt(row, again)
    for name, turns in sides.items():
        _check_turns(row, name, turns, 0)
    return tuple(_side(row, prompt, turns, config) for turns in sides.values())


def _implicit_turns(
    row: dict[str, Any],
    prompt: str | None,
    sides: Mapping[str, list[Turn]],
    config: InstructionsConfig,
) -> tuple[Conversation, ...]:
    chosen, rejected = (_messages(turns) for turns in sides.values())
    cut = _common_length(chosen, rejected)
    if cut == 0:
        raise _different_prompts(row, "the first messages differ")
    for name, turns in sides.items():
        if len(turns) > cut and turns[cut].message["role"] != ASSISTANT:
            role = turns[cut].message["role"]
            raise _different_prompts(row, f"{name}[{cut}], where they part, is of the {role}")
        _check_turns(row, name, turns, cut)
    if isinstance(prompt, str) and prompt.strip():
        squeezed = "".join(prompt.split())
        said = ("".join(message["content"].split()) for message in chosen[:cut])
        if not any(squeezed in content for content in said):
            raise _different_prompts(row, "`prompt` does not stand in what both sides begin with")
    elif prompt is not None and not isinstance(prompt, str):
        raise _mixed_kinds(prompt, "chosen", row["chosen"])
    start = next(iter(sides.values()))[:cut]
    return tuple(_side(row, start, turns[cut:], config) for turns in sides.values())


def _check_turns(row: dict[str, Any], name: str, turns: list[Turn], first: int) -> None:
    """A side is what the assistant says, perhaps with other turns between."""
    for number, which in ((first, "begin"), (len(turns) - 1, "end")):
        if number >= len(turns) or number < first:
            continue
        role = turns[number].message["role"]
        if role != ASSISTANT:
            raise DataError(
                f"{name} {which}s with a message of the {role} ({name}[{number}]), and a side must "
                f"{which} with one of the assistant; put what comes before the answer into "
                f"`prompt`, or leave the row out: {shown(row)}"
            )


def _side(
    row: dict[str, Any], prompt: list[Turn], turns: list[Turn], config: InstructionsConfig
) -> Conversation:
    conversation = conversation_of([*prompt, *turns])._replace(num_context=len(prompt))
    return finish_conversation(row, conversation, config)


def _messages(turns: list[Turn]) -> list[dict[str, Any]]:
    return [turn.message for turn in turns]


def _empty(sides: tuple[Conversation, ...]) -> str | None:
    return None if all(side.answers() for side in sides) else EMPTY_ANSWER


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Elements that both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _different_prompts(row: dict[str, Any], why: str) -> DataError:
    return DataError(
        f"the prompts of chosen and rejected differ ({why}); give both sides one prompt, or put it "
        f"into a column `prompt`: {shown(row)}"
    )


def _repeated_prompt(row: dict[str, Any], sides: Collection[str]) -> DataError:
    return DataError(
        f"the prompt stands at the beginning of {' and '.join(sides)} again; take it out there, or "
        f"leave the column `prompt` out where both sides have it: {shown(row)}"
    )


def _mixed_kinds(prompt: Any, name: str, side: Any) -> DataError:
    return DataError(
        f"prompt is {kind_of(prompt)} and {name} is {kind_of(side)}; give both as text or both as "
        "lists of messages"
    )
