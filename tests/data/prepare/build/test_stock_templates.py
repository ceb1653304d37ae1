"""The rules of well-known models' templates: what is a target is right, or the row is refused."""

from typing import Any

import pytest

from tests.data.prepare.build.test_instructions import encode, shown
from tests.data.prepare.text.instructions import stock
from tests.data.prepare.text.instructions.templates import CHATML, assistant, system, user
from toolkit.errors import DataError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
THOUGHT, AGAIN = "Let me think hard.", "A second thought."


def calls(*names: str, **keys: Any) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": n, "arguments": {"a": 1}}} for n in names]
    return {"role": "assistant", "content": "", "tool_calls": made, **keys}


def thinking(content: str, thought: str) -> dict[str, Any]:
    return {**assistant(content), "reasoning_content": thought}


TWO = [system("Be brief, please."), user("What is it?"), assistant("It is a thing."),
       user("And why so?"), assistant("Because of it.")]  # fmt: skip
SUM = {"role": "tool", "content": '{"sum": 2}'}
ROWS: dict[str, dict[str, Any]] = {
    "two turns": {"messages": TWO},
    "thought": {"messages": [user("What is it?"), thinking("It is a thing.", THOUGHT)]},
    "two thoughts": {
        "messages": [
            user("What is it?"), thinking("It is a thing.", THOUGHT),
            user("And why so?"), thinking("Because of it.", AGAIN),
        ],
    },
    "tool": {
        "messages": [user("What is 1+1?"), calls("add"), SUM, assistant("It is two.")],
        "tools": TOOLS,
    },
    "thoughts and tool": {
        "messages": [
            user("What is 1+1?"), calls("add", reasoning_content=THOUGHT), SUM,
            thinking("It is two.", AGAIN),
        ],
        "tools": TOOLS,
    },
}  # fmt: skip
DIFFERENT = "writes message .* differently once the answer or other messages follow"
DROPPED = "drops the reasoning_content of message 1"
EOT, IM, GEMMA = "«<|eot_id|>»", "«<|im_end|>»", "«<end_of_turn>»"
FINAL = "«<|channel|>»final«<|message|>»"
ANALYSIS = "«<|channel|>»analysis«<|message|>»"
NEXT = "«<|end|>»«<|start|>»assistant"
NO_THOUGHT = "<think>\n\n</think>\n\n"

ALL: dict[tuple[str, str], list[str] | str] = {
    ("LLAMA31", "two turns"): [f"It is a thing.{EOT}", f"Because of it.{EOT}"],
    ("LLAMA31", "thought"): DROPPED,
    ("LLAMA31", "two thoughts"): DROPPED,
    ("LLAMA31", "tool"): [f'{{"name": "add", "parameters": {{"a": 1}}}}{EOT}', f"It is two.{EOT}"],
    ("LLAMA31", "thoughts and tool"): DROPPED,
    ("QWEN3", "two turns"): DIFFERENT,
    ("QWEN3", "thought"): [f"<think>\n{THOUGHT}\n</think>\n\nIt is a thing.{IM}"],
    ("QWEN3", "two thoughts"): DIFFERENT,
    ("QWEN3", "tool"): DIFFERENT,
    ("QWEN3", "thoughts and tool"): [
        f"<think>\n{THOUGHT}\n</think>\n\n<tool_call>\n"
        f'{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call>{IM}',
        f"<think>\n{AGAIN}\n</think>\n\nIt is two.{IM}",
    ],
    ("GEMMA3", "two turns"): [f"It is a thing.{GEMMA}", f"Because of it.{GEMMA}"],
    ("GEMMA3", "thought"): DROPPED,
    ("GEMMA3", "two thoughts"): DROPPED,
    ("GEMMA3", "tool"): "cannot render it: Conversation roles must alternate",
    ("GEMMA3", "thoughts and tool"): "cannot render it: Conversation roles must alternate",
    ("GPT_OSS", "two turns"): "nothing tells the model to stop: .*train_on=last_assistant",
    ("GPT_OSS", "thought"): [f"{ANALYSIS}{THOUGHT}{NEXT}{FINAL}It is a thing.«<|return|>»"],
    ("GPT_OSS", "two thoughts"): DIFFERENT,
    ("GPT_OSS", "tool"): [
        ' to=functions.add«<|channel|>»commentary json«<|message|>»{"a": 1}«<|call|>»',
        f"{FINAL}It is two.«<|return|>»",
    ],
    ("GPT_OSS", "thoughts and tool"): DIFFERENT,
    ("SMOLLM2", "two turns"): [f"It is a thing.{IM}", f"Because of it.{IM}"],
    ("SMOLLM2", "thought"): DROPPED,
    ("SMOLLM2", "two thoughts"): DROPPED,
    ("SMOLLM2", "tool"): "drops the tool call of message 1",
    ("SMOLLM2", "thoughts and tool"): "drops the tool call of message 1",
    ("SMOLLM3", "two turns"): [f"It is a thing.{IM}\n", f"Because of it.{IM}\n"],
    ("SMOLLM3", "thought"): DROPPED,
    ("SMOLLM3", "two thoughts"): DROPPED,
    ("SMOLLM3", "tool"): "drops the tool call of message 1",
    ("SMOLLM3", "thoughts and tool"): "drops the tool call of message 1",
}
LAST: dict[tuple[str, str], list[str] | str] = {
    ("LLAMA31", "tool"): [f"It is two.{EOT}"],
    ("QWEN3", "two turns"): [f"{NO_THOUGHT}Because of it.{IM}"],
    ("QWEN3", "two thoughts"): [f"<think>\n{AGAIN}\n</think>\n\nBecause of it.{IM}"],
    ("QWEN3", "tool"): [f"{NO_THOUGHT}It is two.{IM}"],
    ("GEMMA3", "two turns"): [f"Because of it.{GEMMA}"],
    ("GPT_OSS", "two turns"): [f"{FINAL}Because of it.«<|return|>»"],
    ("GPT_OSS", "two thoughts"): [f"{ANALYSIS}{AGAIN}{NEXT}{FINAL}Because of it.«<|return|>»"],
    # What it thought before the call stands in front of the model, and not in the text.
    ("GPT_OSS", "thoughts and tool"): DIFFERENT,
    ("SMOLLM3", "two turns"): [f"Because of it.{IM}\n"],
}


def targets(row: dict[str, Any], template: str, train_on: str) -> list[str]:
    text = shown(*encode(row, template, train_on=train_on))
    return [part.partition("]]")[0] for part in text.split("[[")[1:]]


@pytest.mark.parametrize(
    ("train_on", "name", "row", "expected"),
    [
        (train_on, *key, expected)
        for train_on, table in (("assistant", ALL), ("last_assistant", LAST))
        for key, expected in table.items()
    ],
)
def test_targets_are_what_the_model_says_or_the_row_is_refused(
    train_on: str, name: str, row: str, expected: list[str] | str
) -> None:
    template = getattr(stock, name)
    if isinstance(expected, list):
        assert targets(ROWS[row], template, train_on) == expected
        return
    with pytest.raises(DataError, match=expected) as error:
        targets(ROWS[row], template, train_on)
    assert "\n" not in str(error.value)


def test_calls_beyond_the_first_are_not_lost() -> None:
    row = {"messages": [user("1+1, 2+2?"), calls("add", "add"), SUM, assistant("2 and 4 it is.")],
           "tools": TOOLS}  # fmt: skip
    with pytest.raises(DataError, match="drops the tool call of message 1"):
        targets(row, stock.GPT_OSS, "assistant")
    with pytest.raises(DataError, match="one call at a time"):
        targets(row, stock.LLAMA31, "assistant")


def test_reasoning_can_be_left_out_by_name() -> None:
    row = ROWS["thought"]
    text = shown(*encode(row, CHATML, ignored_keys=("reasoning_content",)))
    assert text.endswith(f"[[It is a thing.{IM}]]\n")
    row = {"messages": [user("What is it?"), {**assistant("It is."), "thinking": THOUGHT}]}
    with pytest.raises(DataError, match="drops the thinking of message 1"):
        encode(row, CHATML)
    assert targets(row, stock.GPT_OSS, "assistant")[0].startswith(f"{ANALYSIS}{THOUGHT}")


def test_marks_around_the_users_words_are_refused() -> None:
    template = (
        "{% generation %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(DataError, match=r"marks message 0 \(user\) as what the assistant says"):
        encode({"messages": [user("What is it, please?"), assistant("It is.")]}, template)
