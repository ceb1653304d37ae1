"""Turns that are left out of the loss, roles, and which of several templates renders a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.prepare.build.test_instructions import encode, shown
from tests.data.prepare.text.instructions.templates import (
    CHATML,
    EOS,
    MARKED,
    assistant,
    system,
    tokenizer,
    user,
)
from toolkit.data.config import HFTokenizerConfig, InstructionsConfig
from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.choice import templates_hash
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_file
from toolkit.errors import ConfigError, DataError
from toolkit.hf.tokenizer_files import copy_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def turns(**keys: Any) -> dict[str, Any]:
    """Two answers; the first has the keys."""
    return {"messages": [user("1"), {**assistant("one"), **keys}, user("2"), assistant("two")]}


def targets(row: dict[str, Any], template: str | None = CHATML, **config: Any) -> list[str]:
    """What is trained on of each answer."""
    text = shown(*encode(row, template, **config))
    return [part.partition("«")[0] for part in text.split("[[")[1:]]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    "keys",
    [
        {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False},
        {"loss": 0}, {"trainable": False}, {"masked": True}, {"mask": 1}, {"ignore": True},
    ],
)  # fmt: skip
def test_a_turn_can_say_that_it_is_not_trained_on(template: str, keys: dict[str, Any]) -> None:
    assert targets(turns(**keys), template) == ["two"]


@pytest.mark.parametrize(
    "keys", [{"weight": 1}, {"train": True}, {"masked": False}, {"loss": None}]
)
def test_a_turn_that_says_it_is_trained_on_is(keys: dict[str, Any]) -> None:
    assert targets(turns(**keys)) == ["one", "two"]


def test_the_last_of_several_turns_can_be_left_out_of_marks() -> None:
    row = {"messages": [user("1"), assistant("one"), user("2"), {**assistant("two"), "weight": 0}]}
    for template in (CHATML, MARKED):
        assert targets(row, template) == ["one"]
    found, _ = encode(row, CHATML, train_on="last_assistant")
    assert found.left_out == "no target"


def test_sharegpt_and_completions_can_leave_turns_out() -> None:
    sharegpt = [
        {"from": "human", "value": "1"},
        {"from": "gpt", "value": "one", "weight": 0},
        {"from": "human", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    row = {"conversations": sharegpt, "system": "Be brief."}
    assert targets(row) == ["two"]
    assert targets(row, system_prompt="unused") == ["two"]
    del row["system"]
    assert targets(row, system_prompt="Count.") == ["two"]
    row = {"prompt": [user("1")], "completion": turns(weight=0)["messages"][1:]}
    assert targets(row) == ["two"]


def test_a_row_with_all_answers_left_out_has_no_target() -> None:
    row = {"messages": [user("1"), {**assistant("one"), "train": False}]}
    assert encode(row, CHATML)[0].left_out == "no target"


@pytest.mark.parametrize("keys", [{"weight": 0}, {"train": False}, {"masked": True}])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_key_of_the_row_speaks_of_all_its_turns(keys: dict[str, Any], train_on: str) -> None:
    for row in (
        turns(),
        {"instruction": "1", "output": "one"},
        {"prompt": "1", "completion": "one"},
        {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "one"}]},
    ):
        found, _ = encode({**row, **keys}, CHATML, train_on=train_on, system_prompt="Count.")
        assert found.left_out == "no target"
    assert targets({**turns(), **dict.fromkeys(keys)}) == ["one", "two"]
    assert targets({**turns(weight=0), "weight": 1, "loss_of_it": 0.3}) == ["two"]
    assert targets({**turns(), **keys}, ignored_keys=tuple(keys)) == ["one", "two"]
    with pytest.raises(DataError, match=r"weight is 0\.5; a turn is trained on"):
        encode({**turns(), "weight": 0.5}, CHATML)


def test_keys_of_other_names_are_chosen_in_the_config() -> None:
    assert targets(turns(learn=0), train_keys=("learn",)) == ["two"]
    assert targets(turns(skip=True), mask_keys=("skip",)) == ["two"]
    assert targets(turns(loss_scale=0.3), ignored_keys=("loss_scale",)) == ["one", "two"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": 0.5}, "weight is 0.5; a turn is trained on .1 or true. or not .0 or false.,"),
        ({"train": "no"}, "train is 'no'"),
        ({"weight": 1, "loss": False}, "weight and loss contradict each other"),
        ({"loss_mask": [1]}, "the key 'loss_mask' may say that this is not trained on.*mask_keys"),
        ({"trainDetail": []}, "the key 'trainDetail'"),
        ({"step-weights": []}, "the key 'step-weights'"),
        ({"content": [{"type": "text", "text": "one", "weight": 0}]}, "the key 'weight'"),
    ],
)
def test_keys_that_may_leave_turns_out_are_not_ignored(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"byte 213: messages\[1\]: {message}"):
        encode(turns(**keys), CHATML)


def test_what_cannot_be_done_with_such_keys_is_said() -> None:
    with pytest.raises(DataError, match=r"message 1 says that it is not trained on, and .* is all"):
        encode(turns(weight=0), CHATML, train_on="all")
    row = {"messages": [{**user("1"), "train": True}, assistant("one")]}
    with pytest.raises(DataError, match=r"messages\[0\]: asks to be trained on, but its role"):
        encode(row, CHATML)


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("asistant", "did you mean 'assistant'"), ("Assistant", "did you mean 'assistant'"),
        ("gpt", "did you mean 'assistant'"), ("human", "did you mean 'user'"),
        ("sytem", "did you mean 'system'"), ("narrator", "known are system"),
    ],
)  # fmt: skip
def test_roles_that_nobody_knows_are_errors(role: str, hint: str) -> None:
    row = {"messages": [user("1"), {"role": role, "content": "one"}, user("2"), assistant("two")]}
    with pytest.raises(DataError, match=rf"messages\[1\]: role '{role}' is not known.*{hint}"):
        encode(row, CHATML)
    if role == "narrator":
        assert targets(row, context_roles=("narrator",)) == ["two"]


def test_misspelled_senders_are_named_with_the_nearest() -> None:
    row = {"conversations": [{"from": "humna", "value": "1"}, {"from": "gpt", "value": "one"}]}
    with pytest.raises(DataError, match=r"from 'humna' is not known .did you mean 'human'"):
        encode(row, CHATML)


# Templates with names.

WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CHATML
NAMED = {"default": CHATML, "tool_use": WITH_TOOLS, "rag": "RAG\n" + CHATML}


def with_named(folder: Path, form: str, named: dict[str, str] = NAMED) -> Tokenizer:
    """A tokenizer whose folder has templates in one of the forms that are in use."""
    tokenizer().save(folder)
    config = {"eos_token": EOS}
    if form == "list":
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]  # type: ignore[assignment]
    elif form == "mapping":
        config["chat_template"] = named  # type: ignore[assignment]
    else:
        (folder / "additional_chat_templates").mkdir()
        for name, text in named.items():
            own = folder / "additional_chat_templates" / f"{name}.jinja"
            (folder / "chat_template.jinja" if name == "default" else own).write_text(text)
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config))
    return load_file(folder / "tokenizer.json")


def render(made: Tokenizer, row: dict[str, Any], **config: Any) -> str:
    encoder = InstructionEncoder(made, InstructionsConfig(**config))
    (found,) = encoder.encode([Piece("rows.jsonl:0", row=row)])
    return made.decode(found.ids.tolist())


@pytest.mark.parametrize("form", ["list", "mapping", "folder"])
def test_rows_with_tools_take_the_template_for_tools(form: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    row: dict[str, Any] = {"messages": [user("Hi"), assistant("Hello")]}
    with_tools = row | {"tools": TOOLS}
    made = with_named(tmp_path / "given", form)
    # It stays so wherever the tokenizer goes.
    made.save(tmp_path / "saved")
    (tmp_path / "copied").mkdir()
    copy_tokenizer(tmp_path / "saved", tmp_path / "copied")
    for folder in ("given", "saved", "copied"):
        found = load_file(tmp_path / folder / "tokenizer.json")
        assert found.chat_templates == NAMED
        assert render(found, with_tools) == json.dumps(TOOLS[0]) + "\n" + render(found, row)
        assert render(found, row, chat_template="rag").startswith("RAG\n<|im_start|>user")
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder)
        for tools in (None, TOOLS):
            wanted = theirs.apply_chat_template(row["messages"], tools=tools, tokenize=False)
            assert render(found, row | {"tools": tools}) == wanted


def test_names_that_do_not_exist_are_errors(tmp_path: Path) -> None:
    row = {"messages": [user("Hi"), assistant("Hello")]}
    made = with_named(tmp_path / "all", "list")
    with pytest.raises(ConfigError, match=r"'tols' is no Jinja.*called default, tool_use, rag"):
        render(made, row, chat_template="tols")
    made = with_named(tmp_path / "some", "list", {"rag": CHATML, "tool_use": WITH_TOOLS})
    assert render(made, {**row, "tools": TOOLS}).startswith('{"type"')
    with pytest.raises(DataError, match="called rag, tool_use, and none is the default one"):
        render(made, row)


def test_a_chosen_template_is_the_only_one_that_stays(tmp_path: Path) -> None:
    for form in ("list", "folder"):
        made = with_named(tmp_path / form, form).with_chat_template(CHATML)
        made.save(tmp_path / f"{form}2")
        found = load_file(tmp_path / f"{form}2" / "tokenizer.json")
        assert found.chat_templates == {"default": CHATML}


def test_a_template_that_drops_tools_is_an_error(tmp_path: Path) -> None:
    row = {"messages": [system("add"), user("Hi"), assistant("Hello")], "tools": TOOLS}
    with pytest.raises(DataError, match="chat template drops the tools of the row"):
        encode(row, CHATML)
    # It reads them, and leaves them out all the same.
    silent = "{% if tools and false %}{{ tools }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="chat template drops the tools of the row"):
        encode(row, silent)
    some = "{% for t in (tools or [])[:1] %}{{ t | tojson }}{% endfor %}" + CHATML
    two = [*TOOLS, {"type": "function", "function": {"name": "multiply"}}]
    with pytest.raises(DataError, match="chat template drops the tool 'multiply' of the row"):
        encode(row | {"tools": two}, some)
    with pytest.raises(DataError, match="has tools, and the tokenizer has no chat template"):
        encode({"prompt": "a", "completion": "b", "tools": TOOLS})


def test_changed_template_files_are_noticed(tmp_path: Path) -> None:
    config = HFTokenizerConfig(path=str(tmp_path / "all"))
    with_named(tmp_path / "all", "folder")
    before = templates_hash(config)
    assert before == templates_hash(HFTokenizerConfig(path=str(tmp_path / "all/tokenizer.json")))
    (tmp_path / "all/additional_chat_templates/tool_use.jinja").write_text(CHATML)
    assert templates_hash(config) != before
