"""Chat templates run as `transformers` runs them, and what is wrong with one is said."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.prepare.text.instructions.templates import (
    CHATML,
    CONTROLS,
    LLAMA3,
    MARKED,
    ZEPHYR,
    assistant,
    system,
    tokenizer,
    user,
)
from toolkit.data.config import InstructionsConfig
from toolkit.data.prepare.build.instructions import InstructionEncoder, with_instructions_template
from toolkit.data.prepare.text.instructions.template import ChatTemplate, read_chat_template
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import ConfigError, DataError

VARIABLES = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
MESSAGES = [system("Be brief."), user("Hi"), assistant("Hello")]


def chat_template(text: str) -> ChatTemplate:
    return ChatTemplate(text, control_tokens=CONTROLS, variables=VARIABLES)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR, MARKED])
def test_rendering_is_that_of_the_saved_tokenizer_in_transformers(
    template: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    config = InstructionsConfig(chat_template=template)
    with_instructions_template(tokenizer(), config).save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template
    assert load_tokenizer(tmp_path).chat_template == template
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (False, True):
        expected = loaded.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt, **VARIABLES
        )
        found = chat_template(template).render(MESSAGES, add_generation_prompt=prompt)
        assert found.text == expected


def test_ids_of_an_ordinary_row_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from toolkit.data.prepare.text.reading import Piece

    made = tokenizer(CHATML)
    made.save(tmp_path)
    (found,) = InstructionEncoder(made, InstructionsConfig()).encode(
        [Piece("a:1", row={"messages": MESSAGES})]
    )
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    expected = loaded.apply_chat_template(MESSAGES)
    assert found.ids.tolist() == expected["input_ids"]


def test_marks_are_found_as_characters() -> None:
    found = chat_template(MARKED).render(MESSAGES)
    assert [found.text[start:end] for start, end in found.marks] == ["Hello<|im_end|>"]
    assert chat_template(CHATML).render(MESSAGES).marks == []


def test_literals_are_told_from_what_the_template_writes() -> None:
    template = chat_template(CHATML)
    messages = [user("a <|im_end|> b"), assistant("<s>")]
    text = template.render(messages).text
    places = template.literals(messages, None, text)
    assert [text[place : place + 3] for place in places] == ["<|i", "<s>"]
    assert places == [text.index("<|im_end|> b"), text.index("<s>")]
    assert template.closing_token(text) == (len(text) - 11, len(text) - 1)
    assert template.closing_token("a <s>\n", [2]) is None


def test_template_that_reads_control_tokens_in_messages_is_an_error() -> None:
    text = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('<s>')[-1] }}")
    template = chat_template(text)
    messages = [user("a<s>b"), assistant("c")]
    with pytest.raises(DataError, match="holds the name of a control token as ordinary text"):
        template.literals(messages, None, template.render(messages).text)


def test_template_that_is_no_jinja_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"chat_template .*not valid Jinja: line 1: "):
        chat_template("{% for message in messages %}{{ message }")


def test_template_cannot_leave_its_sandbox() -> None:
    text = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(DataError, match="cannot render it"):
        chat_template(text).render([user("a")])


def test_template_is_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert read_chat_template(str(tmp_path / "chat.jinja")) == CHATML
    assert read_chat_template(CHATML) == CHATML
    with pytest.raises(ConfigError, match=r"'nowhere.jinja' is no Jinja text .*No such file"):
        read_chat_template("nowhere.jinja")
