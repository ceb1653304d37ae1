"""What is said of instruction data that would train on nothing, or on everything."""

import re
from typing import Any

import pytest

from tests.data.prepare.text.instructions.templates import (
    CHATML,
    CLOSING,
    LLAMA3,
    MARKED,
    THINKING,
    ZEPHYR,
    assistant,
    system,
    tokenizer,
    user,
)
from toolkit.data.config import InstructionsConfig
from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.text.instructions.checks import check_nothing_dropped, excerpt
from toolkit.data.prepare.text.instructions.template import ChatTemplate
from toolkit.data.prepare.text.reading import Piece
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


def test_an_answer_that_its_row_masks_is_said_to_be_masked() -> None:
    counts = {"num_tokens": 0, "num_targets": None, "filtered": {"no target": 1}}
    with pytest.raises(DataError) as caught:
        check({"messages": [user("Hi"), {**assistant("Hello"), "weight": 0}]}, CHATML, counts)
    assert str(caught.value) == (
        "dataset.instructions: the loss would count no token of this data: 1 row has no answer of "
        "the assistant that is trained on; in the first row, message 1 says that it is not (weight "
        "0, or trainable false, or the like): take that out of what should be trained on; one row, "
        "targets in [[ ]]: user: Hi assistant: Hello"
    )


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_an_error_shows_targets_of_long_rows(train_on: str) -> None:
    row = {"messages": [system("ok"), user("x" * 4000), assistant("Hello"), user("y" * 4000)]}
    encoder = InstructionEncoder(tokenizer(NO_SYSTEM), InstructionsConfig(train_on=train_on))  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        encoder.encode([Piece("a:1", row=row)])
    shown = str(caught.value).partition("; the row, targets in [[ ]]: ")[2]
    assert len(shown) < 500
    if train_on == "all":
        assert (shown[:4], shown[-2:]) == ("[[<|", "]]")
    else:
        assert re.search(r"x<\|im_end\|>\\n<\|im_start\|>assistant\\n\[\[Hello", shown)


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


def only(role: str) -> str:
    return CHATML.replace("for message in messages", f"for message in messages if {role}")


NO_SYSTEM = only("message.role != 'system'")
NO_USER = only("message.role != 'user'")


def encode(template: str, *messages: dict[str, Any]) -> None:
    encoder = InstructionEncoder(tokenizer(template), InstructionsConfig(train_on="last_assistant"))
    list(encoder.encode([Piece("a:1", row={"messages": list(messages)})]))


@pytest.mark.parametrize(
    ("template", "messages", "dropped"),
    [
        (NO_SYSTEM, [system("ok"), user("is it ok"), assistant("yes")], "message 0 (system)"),
        (NO_USER, [user("a"), assistant("an apple a day")], "message 0 (user)"),
        (NO_USER, [system("a"), user("assistant"), assistant("b")], "message 1 (user)"),
        (
            NO_SYSTEM,
            [system("be brief and kind"), user("what is: be brief and kind?"), assistant("x")],
            "message 0 (system)",
        ),
        (
            "You are a helpful assistant.\n" + NO_USER,
            [user("You are a helpful assistant."), assistant("Of course, as always")],
            "message 0 (user)",
        ),
    ],
)
def test_a_dropped_message_is_noticed_where_other_text_holds_the_same(
    template: str, messages: list[dict[str, str]], dropped: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"drops text: {dropped} does not occur")):
        encode(template, *messages)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR, MARKED, THINKING, CLOSING])
def test_messages_that_hold_each_other_are_no_dropped_text(template: str) -> None:
    for said in ("ok", "<br>", "[1, 2]", "?!", "assistant", "<tool_call>", "\U000f0001"):
        turn = [user(f"is it {said}"), assistant(f"<think>{said}</think>\n{said}")]
        encode(template, system(said), *turn, *turn[:1], assistant(f"{said} then"))


def test_rows_of_ordinary_text_are_rendered_no_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    render = ChatTemplate.render

    def spy(self: ChatTemplate, messages: list[Any], *args: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return render(self, messages, *args, **options)

    monkeypatch.setattr(ChatTemplate, "render", spy)
    encode(CHATML, user("What is the capital of France?"), assistant("It is Paris, I think."))
    assert rendered == [0, 2, 1]
    rendered.clear()
    encode(CHATML, user("Paris?"), assistant("It is Paris, I think."))
    assert rendered == [0, 2, 2, 1]


def test_space_may_change_and_thoughts_of_earlier_turns_may_go() -> None:
    check_nothing_dropped([user(" a  b\n")], "user: a b")
    thought = [assistant("<think>x</think>\n2"), user("y")]
    check_nothing_dropped(thought, "2y")
    with pytest.raises(DataError, match=r"message 0 \(assistant\)"):
        check_nothing_dropped(thought[:1], "2y")
    with pytest.raises(DataError, match=r"message 1 \(user\)"):
        check_nothing_dropped([user("same"), user("same")], "same")
