"""Rows of preference and binary data become conversations with one prompt; others are refused."""

import re
from typing import Any

import pytest

from tests.data.prepare.text.instructions.templates import assistant, system, user
from toolkit.data.config import InstructionsConfig
from toolkit.data.prepare.text.columns import TextColumns
from toolkit.data.prepare.text.instructions.conversations import read_conversation
from toolkit.data.prepare.text.instructions.preference import (
    EMPTY_ANSWER,
    EQUAL_SIDES,
    READERS,
    Comparison,
)
from toolkit.data.source_config import FilesSourceConfig
from toolkit.errors import DataError

ASK, GOOD, BAD = user("Sky?"), assistant("Blue."), assistant("Green.")


def read(row: dict[str, Any], kind: Any = "preference", **config: Any) -> Comparison:
    return READERS[kind](row, InstructionsConfig(kind=kind, **config))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green.", "score": 1},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Sky?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, {**GOOD, "name": None}], "rejected": [{**ASK, "tools": None}, BAD]},
    ],
)
def test_explicit_and_implicit_prompts_give_the_same_sides(row: dict[str, Any]) -> None:
    chosen, rejected = read(row).sides
    assert (chosen.messages, rejected.messages) == ([ASK, GOOD], [ASK, BAD])
    assert (chosen.num_context, rejected.num_context) == (1, 1)
    assert not chosen.is_written


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "sides"),
    [
        ("Q: Sky? A: Blue.", "Q: Sky? A: Green.", "Q: Sky? A:", (" Blue.", " Green.")),
        ("Q: one\nA:\n2", "Q: one\nA:\n3", "Q: one\nA:\n", ("2", "3")),
        ("Ask. It is", "Ask. I am", "Ask. I", ("t is", " am")),
    ],
)
def test_texts_without_a_prompt_are_cut_where_trl_cuts_them(
    chosen: str, rejected: str, prompt: str, sides: tuple[str, str]
) -> None:
    found = read({"chosen": chosen, "rejected": rejected}).sides
    assert [side.plain for side in found] == [(prompt, side) for side in sides]
    assert all(side.is_written for side in found), "no template goes around it"


def test_prompts_may_have_turns_tools_and_a_system_prompt() -> None:
    call = {**assistant(""), "tool_calls": [{"function": {"name": "sky"}}]}
    prompt = [ASK, call, {"role": "tool", "content": "blue"}]
    row = {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD, user("No."), GOOD]}
    found = read({**row, "tools": '[{"name": "sky"}]'}, system_prompt="Be kind.")
    for side in found.sides:
        assert side.messages[:2] == [system("Be kind."), ASK]
        assert (side.num_context, side.tools) == (4, [{"name": "sky"}])
    assert found.sides[1].answers() == [4, 6]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, EQUAL_SIDES),
        ({"chosen": "a", "rejected": "a"}, EQUAL_SIDES),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, EQUAL_SIDES),
        ({"prompt": "p", "chosen": " ", "rejected": "a"}, EMPTY_ANSWER),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": []}, EMPTY_ANSWER),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [assistant("")]}, EMPTY_ANSWER),
        ({"chosen": [ASK, GOOD], "rejected": [ASK]}, EMPTY_ANSWER),
        ({"chosen": "Q: Sky? A:", "rejected": "Q: Sky? A: Blue"}, EMPTY_ANSWER),
    ],
)
def test_rows_that_compare_nothing_are_left_out(row: dict[str, Any], reason: str) -> None:
    assert read(row).left_out == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "has no column 'rejected'.*there are prompt, chosen"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, r"chosen is null.*\{prompt: 'p', rej"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "chosen is text and rejected is a lis"),
        ({"prompt": [ASK], "chosen": "a", "rejected": "b"}, "prompt is a list and chosen is text"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "prompt has no messages"),
        ({"chosen": "Blue", "rejected": "Green"}, "differ .the texts have no common.*'Blue'"),
        (
            {"chosen": [ASK, GOOD], "rejected": [user("Sea?"), BAD]},
            "prompts of chosen and rejected differ .the first messages differ.*user: Sea",
        ),
        (
            {"chosen": [system("s"), ASK, GOOD], "rejected": [system("s"), user("Sea?"), BAD]},
            r"differ .chosen\[1\], where they part, is of the user",
        ),
        (
            {"prompt": "Sea?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
            "`prompt` does not stand in what both sides begin with",
        ),
        (
            {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [BAD]},
            "the prompt stands at the beginning of chosen again",
        ),
        (
            {"prompt": "Tell me a joke.", "chosen": "Tell me a joke. Ha", "rejected": "Tell me a "
             "joke. Ho"},
            "the prompt stands at the beginning of chosen and rejected again",
        ),
        (
            {"prompt": [ASK], "chosen": [GOOD, user("And?")], "rejected": [BAD]},
            r"chosen ends with a message of the user \(chosen\[1\]\).*user: And\?",
        ),
        (
            {"prompt": [ASK], "chosen": [GOOD], "rejected": [user("And?"), BAD]},
            r"rejected begins with a message of the user \(rejected\[0\]\)",
        ),
        (
            {"prompt": [ASK], "chosen": [GOOD], "rejected": [{"role": "bot", "content": "x"}]},
            r"rejected\[0\]: role 'bot' is not known",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_compared_are_shown(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(row)
    assert "\n" not in str(caught.value)


def test_binary_rows_have_a_label_that_is_true_or_false() -> None:
    found = read({"prompt": "p", "completion": "a", "label": False}, "binary")
    assert (len(found.sides), found.is_desirable, found.left_out) == (1, False, None)
    found = read({"prompt": [ASK], "completion": [GOOD], "label": True}, "binary")
    assert (found.sides[0].messages, found.is_desirable) == ([ASK, GOOD], True)
    found = read({"prompt": [ASK], "completion": [], "label": True}, "binary")
    assert found.left_out == EMPTY_ANSWER
    for label in (1, 0.0, "true"):
        with pytest.raises(DataError, match=f"label is {label!r}, and must be true"):
            read({"prompt": "p", "completion": "a", "label": label}, "binary")
    with pytest.raises(DataError, match="label is null"):
        read({"prompt": "p", "completion": "a", "label": None}, "binary")
    with pytest.raises(DataError, match="prompt is text and completion is a list"):
        read({"prompt": "p", "completion": [GOOD], "label": True}, "binary")


@pytest.mark.parametrize(
    ("kind", "row", "wanted"),
    [
        ("conversations", {"prompt": "p", "chosen": "a", "rejected": "b"}, "preference, and .*dpo"),
        ("conversations", {"prompt": "p", "completion": "a", "label": True}, "binary, and .*kto"),
        ("preference", {"messages": [ASK, GOOD]}, "conversations, and .*language model"),
        ("preference", {"prompt": "p", "completion": "a", "label": True}, "binary, and .*kto"),
        ("binary", {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "preference, and .*dpo"),
    ],
)
def test_a_row_of_another_kind_names_the_kind_that_fits(
    kind: Any, row: dict[str, Any], wanted: str
) -> None:
    reader = READERS.get(kind, read_conversation)
    with pytest.raises(DataError, match=f"set dataset.instructions.kind to {wanted}"):
        reader(row, InstructionsConfig(kind=kind))


def test_text_that_is_not_there_names_the_kind_that_fits() -> None:
    columns = TextColumns(FilesSourceConfig(paths=[]))
    fits = re.escape("(of preference data: set dataset.instructions.kind to preference, and")
    with pytest.raises(DataError, match=f"has no column 'text'.*{fits}"):
        columns.text({"chosen": "a", "rejected": "b"}, "rows.jsonl, line 1")


def test_a_shape_goes_with_conversations_alone() -> None:
    with pytest.raises(ValueError, match="shape sharegpt goes with kind=conversations"):
        InstructionsConfig(kind="preference", shape="sharegpt")
