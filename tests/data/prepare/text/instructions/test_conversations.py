"""Rows of every shape become the same conversations; rows of none say what is known."""

from typing import Any

import pytest

from toolkit.data.config import InstructionsConfig
from toolkit.data.prepare.text.instructions.conversations import Conversation, read_conversation
from toolkit.data.prepare.text.reading import at
from toolkit.errors import DataError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}


def read(row: dict[str, Any], **config: Any) -> Conversation:
    with at("a.jsonl:3"):
        return read_conversation(row, InstructionsConfig(**config))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO], "id": 7},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [HI], "completion": [HELLO]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "conversations": [
                {"from": "USER", "value": "Hi"},
                {"from": "Assistant", "value": "Hello"},
            ]
        },
        {"conversations": [HI, HELLO]},
        {"messages": [{**HI, "content": [{"type": "text", "text": "H"}, "i"]}, HELLO]},
        {"messages": [{**HI, "name": None, "tool_calls": None}, HELLO], "tools": None},
    ],
)
def test_columns_tell_the_shape(row: dict[str, Any]) -> None:
    assert read(row).messages == [HI, HELLO]
    assert read(row).answers() == [1]


def test_sharegpt_names_become_roles_and_a_system_column_is_read() -> None:
    names = ["system", "human", "function_call", "observation", "gpt"]
    turns = [{"from": name, "value": name} for name in names]
    roles = [message["role"] for message in read({"conversations": turns}).messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    found = read({"system": "Be kind.", "conversations": turns[1:]}).messages[0]
    assert found == {"role": "system", "content": "Be kind."}
    with pytest.raises(DataError, match=r"a.jsonl:3: conversations\[0\]: from 'narrator' is not"):
        read({"conversations": [{"from": "narrator", "value": "x"}]})


def test_other_keys_and_roles_of_messages_pass() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    answer = {"role": "tool", "content": "2", "tool_call_id": "1"}
    found = read({"messages": [HI, call, answer], "tools": [{"name": "f"}]})
    assert found.messages[1:] == [{**call, "content": ""}, answer]
    assert (found.answers(), found.tools) == ([1], [{"name": "f"}])


def test_unknown_columns_list_the_shapes() -> None:
    with pytest.raises(DataError) as caught:
        read({"question": "a", "answer": "b"})
    message = str(caught.value)
    assert message.startswith("a.jsonl:3: columns question, answer fit no shape")
    for shape in ("messages", "prompt + completion", "instruction + output", "conversations"):
        assert shape in message
    both = {"messages": [HI], "prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match="fit the shapes messages and prompt_completion; set"):
        read(both)
    assert read(both, shape="prompt_completion").messages[0]["content"] == "a"
    with pytest.raises(DataError, match=r"no column 'conversations', which .*shape=sharegpt needs"):
        read(both, shape="sharegpt")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi"}, "messages: must be a list of messages, not text"),
        ({"messages": ["Hi"]}, r"messages\[0\]: must have role and content, but is text"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\]: has no role"),
        ({"messages": [{"from": "gpt", "value": "x"}]}, "read with shape=sharegpt"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: has no content \(keys: role\)"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text .* not int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "part of type 'image'; only text can be trained on",
        ),
        ({"messages": [HI], "tools": "{"}, "tools is not valid JSON"),
        ({"messages": [HI], "tools": '{"a": 1}'}, "tools must be a list, not an object"),
        ({"prompt": "a", "completion": [HELLO]}, "prompt is text and completion is a list"),
        ({"instruction": "a", "output": 3}, "output must be text, not int"),
        ({"conversations": {}}, "conversations must be a list, not an object"),
    ],
)
def test_rows_of_another_form_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{message}"):
        read(row)


def test_system_prompt_does_not_move_what_is_context() -> None:
    row = {"prompt": [HI, HELLO, HI], "completion": [HELLO]}
    found = read(row, system_prompt="Be kind.")
    assert found.messages[0] == {"role": "system", "content": "Be kind."}
    assert found.answers() == [4]
