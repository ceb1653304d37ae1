"""What is said of instruction data that would train on nothing, or on everything."""

from typing import Any

import pytest

from tests.data.text.instructions.templates import CHATML, assistant, tokenizer, user
from toolkit.data.config import InstructionsConfig
from toolkit.data.text.instructions.checks import check_nothing_dropped, excerpt
from toolkit.data.text.piece import Piece
from toolkit.data.tokens.instructions import InstructionEncoder
from toolkit.errors import DataError


def check(row: dict[str, Any], template: str | None, counts: dict[str, Any], **config: Any) -> None:
    encoder = InstructionEncoder(tokenizer(template), InstructionsConfig(**config))
    encoder.check(first_piece=lambda: Piece("a:1", row=row), **counts)


def test_sample_is_short_and_shows_the_targets() -> None:
    assert excerpt("ab\ncd", [(3, 4)]) == r"ab\n[[c]]d"
    assert excerpt("abc", [(0, 3)]) == "[[abc]]"
    long = excerpt("x" * 1000 + "yy" + "z" * 1000, [(1000, 1002)])
    assert len(long) < 300
    assert "[[yy]]" in long
    assert " ... " in long
    many = excerpt("ab" * 500, [(2 * n, 2 * n + 1) for n in range(500)])
    assert len(many) < 100


def test_data_without_any_target_shows_a_row() -> None:
    counts = {"num_tokens": 0, "num_targets": None, "filtered": {"no target": 1200}}
    with pytest.raises(DataError) as caught:
        check({"messages": [user("Hi"), user("there")]}, CHATML, counts)
    message = str(caught.value)
    assert "would count no token of this data: 1,200 rows have no answer" in message
    assert message.endswith("targets in [[ ]]: user: Hi user: there")


def test_data_that_is_all_targets_shows_a_row() -> None:
    row = {"prompt": "", "completion": "once upon a time"}
    counts: dict[str, Any] = {"num_tokens": 99, "num_targets": 99, "filtered": {}}
    with pytest.raises(DataError) as caught:
        check(row, None, counts)
    message = str(caught.value)
    assert "would count every token" in message
    assert "train_on is assistant" in message
    assert message.endswith("[[once upon a time]]")
    check(row, None, {**counts, "num_targets": None}, train_on="all")


def test_data_with_some_targets_passes() -> None:
    counts: dict[str, Any] = {"num_tokens": 99, "num_targets": 1, "filtered": {"no target": 5}}
    check({"messages": [user("Hi"), assistant("Hello")]}, CHATML, counts)


def test_space_may_change_and_thoughts_of_earlier_turns_may_go() -> None:
    check_nothing_dropped([user(" a  b\n")], "user: a b")
    thought = [assistant("<think>x</think>\n2"), user("y")]
    check_nothing_dropped(thought, "2y")
    with pytest.raises(DataError, match=r"message 0 \(assistant\)"):
        check_nothing_dropped(thought[:1], "2y")
    with pytest.raises(DataError, match=r"message 1 \(user\)"):
        check_nothing_dropped([user("same"), user("same")], "same")
