"""Rows of instruction data as tokens: which are targets, and which are control tokens."""

import gzip
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tests.data.prepare.text.instructions.templates import (
    BOS,
    CHATML,
    CLOSING,
    EOS,
    LLAMA3,
    MARKED,
    THINKING,
    ZEPHYR,
    assistant,
    system,
    tokenizer,
    user,
)
from tests.data.prepare.text.reading import read_all
from toolkit.data.config import FilesSourceConfig, InstructionsConfig
from toolkit.data.prepare.build.encoding import Encoded
from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import DataError

TWO_TURNS = [
    system("Be brief."),
    user("Hi"),
    assistant("Hello!"),
    user("Bye"),
    assistant("So long"),
]


def encode(
    row: dict[str, Any],
    template: str | None = None,
    *,
    eos_token: str = EOS,
    append_eos: bool = True,
    **config: Any,
) -> tuple[Encoded, Tokenizer]:
    made = tokenizer(template, eos_token=eos_token)
    encoder = InstructionEncoder(made, InstructionsConfig(**config), append_eos=append_eos)
    (found,) = encoder.encode([Piece("rows.jsonl:213", row=row, place="rows.jsonl, byte 213")])
    return found, made


def shown(found: Encoded, made: Tokenizer) -> str:
    """Every token: targets between brackets, control tokens by name, the others as text."""
    mask = found.is_target if found.is_target is not None else np.ones(len(found.ids), dtype=bool)
    assert mask.shape == found.ids.shape
    assert mask.dtype == bool
    text, inside = "", False
    for token, is_target in zip(found.ids.tolist(), mask.tolist(), strict=True):
        if is_target != inside:
            text, inside = text + ("[[" if is_target else "]]"), is_target
        text += f"«{made.decode([token])}»" if token >= 256 else made.decode([token])
    return text + ("]]" if inside else "")


def test_chatml_trains_what_the_assistant_says_and_its_end_of_turn() -> None:
    found, made = encode({"messages": TWO_TURNS}, CHATML)
    assert shown(found, made) == (
        "«<|im_start|>»system\nBe brief.«<|im_end|>»\n«<|im_start|>»user\nHi«<|im_end|>»\n"
        "«<|im_start|>»assistant\n[[Hello!«<|im_end|>»]]\n«<|im_start|>»user\nBye«<|im_end|>»\n"
        "«<|im_start|>»assistant\n[[So long«<|im_end|>»]]\n"
    )
    assert (found.eos_is_target, found.ends_with_eos, found.left_out) == (False, False, None)


def test_last_assistant_trains_the_last_turn_only() -> None:
    found, made = encode({"messages": TWO_TURNS}, CHATML, train_on="last_assistant")
    text = shown(found, made)
    assert text.count("[[") == 1
    assert text.endswith("assistant\n[[So long«<|im_end|>»]]\n")


def test_all_trains_every_token_of_the_rendering() -> None:
    found, made = encode({"messages": TWO_TURNS}, CHATML, train_on="all")
    assert found.is_target is None
    assert found.eos_is_target
    assert made.decode(found.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_llama3_brings_its_own_bos_and_its_turns_end_with_eot() -> None:
    found, made = encode({"messages": TWO_TURNS[1:]}, LLAMA3)
    head = "«<|start_header_id|>»{}«<|end_header_id|>»\n\n"
    assert shown(found, made) == (
        f"«<s>»{head.format('user')}Hi«<|eot_id|>»"
        f"{head.format('assistant')}[[Hello!«<|eot_id|>»]]{head.format('user')}Bye«<|eot_id|>»"
        f"{head.format('assistant')}[[So long«<|eot_id|>»]]"
    )
    assert found.starts_with_bos
    assert not found.ends_with_eos
    assert not found.eos_is_target


def test_zephyr_ends_with_eos_once_and_it_is_a_target() -> None:
    found, made = encode({"messages": TWO_TURNS[1:]}, ZEPHYR)
    assert shown(found, made) == (
        f"<|user|>\nHi«{EOS}»\n<|assistant|>\n[[Hello!«{EOS}»]]\n<|user|>\nBye«{EOS}»\n"
        f"<|assistant|>\n[[So long«{EOS}»]]"
    )
    assert found.ends_with_eos
    assert found.ids[-1] == made.eos_id


def test_end_of_turn_that_is_the_eos_is_not_doubled() -> None:
    found, made = encode({"messages": TWO_TURNS}, CHATML, eos_token="<|im_end|>")
    assert found.ends_with_eos
    assert shown(found, made).endswith("[[So long«<|im_end|>»]]")


def test_marks_of_the_template_are_taken() -> None:
    found, made = encode({"messages": TWO_TURNS[1:]}, MARKED)
    assert shown(found, made) == (
        "«<|im_start|>»user\nHi«<|im_end|>»«<|im_start|>»assistant\n[[Hello!«<|im_end|>»]]"
        "«<|im_start|>»user\nBye«<|im_end|>»«<|im_start|>»assistant\n[[So long«<|im_end|>»]]"
    )
    found, made = encode({"messages": TWO_TURNS[1:]}, MARKED, train_on="last_assistant")
    assert shown(found, made).count("[[") == 1
    assert shown(found, made).endswith("[[So long«<|im_end|>»]]")


def test_template_without_generation_prompt_does_not_train_the_role() -> None:
    found, made = encode({"messages": TWO_TURNS[1:]}, CLOSING)
    assert shown(found, made) == (
        "«<|im_start|>»user: Hi«<|im_end|>»«<|im_start|>»assistant: [[Hello!«<|im_end|>»]]"
        "«<|im_start|>»user: Bye«<|im_end|>»«<|im_start|>»assistant: "
        f"[[So long«<|im_end|>»«{EOS}»]]"
    )
    assert found.ends_with_eos


THOUGHTS = [user("1+1"), assistant("<think>\nadd\n</think>\n\n2"), user("2+2"),
            assistant("<think>\nadd again\n</think>\n\n4")]  # fmt: skip


def test_template_that_drops_earlier_thoughts_trains_the_last_turn_exactly() -> None:
    found, made = encode({"messages": THOUGHTS}, THINKING, train_on="last_assistant")
    assert shown(found, made) == (
        "«<|im_start|>»user\n1+1«<|im_end|>»\n«<|im_start|>»assistant\n2«<|im_end|>»\n"
        "«<|im_start|>»user\n2+2«<|im_end|>»\n«<|im_start|>»assistant\n"
        "[[<think>\nadd again\n</think>\n\n4«<|im_end|>»]]\n"
    )
    found, made = encode({"messages": THOUGHTS}, THINKING, train_on="all")
    assert found.is_target is None
    assert "add\n" not in made.decode(found.ids)


def test_template_that_rewrites_trained_turns_is_an_error_with_advice() -> None:
    with pytest.raises(DataError) as caught:
        encode({"messages": THOUGHTS}, THINKING)
    message = str(caught.value)
    assert message.startswith(
        "rows.jsonl, byte 213: the chat template writes message 1 (assistant) or"
    )
    assert "train_on=last_assistant" in message
    assert "<|im_start|>user\\n1+1<|im_end|>" in message
    assert "\n" not in message
    # Nothing is rewritten where there is nothing to drop.
    found, made = encode({"messages": TWO_TURNS}, THINKING)
    assert shown(found, made).count("[[") == 2


@pytest.mark.parametrize("literal", ["<|im_end|>", EOS, "<|im_start|>assistant\nsure<|im_end|>"])
@pytest.mark.parametrize("template", [CHATML, ZEPHYR, MARKED])
def test_names_of_control_tokens_in_messages_stay_text(template: str, literal: str) -> None:
    row = {"messages": [user(f"What is {literal}?"), assistant(f"{literal} is a token{literal}")]}
    plain = {"messages": [user("What is X?"), assistant("X is a tokenX")]}
    found, made = encode(row, template)
    reference, _ = encode(plain, template)
    assert found.ids[found.ids >= 256].tolist() == reference.ids[reference.ids >= 256].tolist()
    assert shown(found, made) == shown(reference, made).replace("X", literal)
    assert found.ends_with_eos == reference.ends_with_eos


def test_literal_eos_at_the_end_of_an_answer_is_no_end_of_document() -> None:
    found, made = encode({"prompt": "Name it: ", "completion": EOS})
    assert not found.ends_with_eos
    assert found.eos_is_target
    assert found.ids.max() < 256
    assert shown(found, made) == f"Name it: [[{EOS}]]"


def test_rows_with_and_without_literals_are_encoded_alike() -> None:
    made = tokenizer(LLAMA3)
    encoder = InstructionEncoder(made, InstructionsConfig())
    row = {"messages": [user("a <s> b"), assistant("né 😀 c")]}
    (found,) = encoder.encode([Piece("r:1", row=row)])
    assert shown(found, made).split("user")[1].startswith("«<|end_header_id|>»\n\na <s> b«")
    assert made.decode(found.ids).endswith("né 😀 c<|eot_id|>")


def test_prompt_and_completion_without_template_are_joined_as_they_are() -> None:
    found, made = encode({"prompt": "2+2=", "completion": "4"})
    assert shown(found, made) == "2+2=[[4]]"
    assert found.eos_is_target
    found, made = encode({"prompt": "2+2=", "completion": "4"}, system_prompt="Sum.")
    assert shown(found, made) == "Sum.\n\n2+2=[[4]]"


def test_alpaca_has_a_plain_form_and_uses_the_template_where_there_is_one() -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    found, made = encode(row)
    assert shown(found, made) == (
        "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n[[2]]"
    )
    assert shown(*encode({**row, "input": ""})) == "### Instruction:\nAdd.\n\n### Response:\n[[2]]"
    assert shown(*encode(row, CHATML)) == (
        "«<|im_start|>»user\nAdd.\n\n1 1«<|im_end|>»\n«<|im_start|>»assistant\n[[2«<|im_end|>»]]\n"
    )


def test_answers_in_the_prompt_are_context() -> None:
    row = {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]}
    for template in (CHATML, MARKED):
        text = shown(*encode(row, template))
        assert text.count("[[") == 1
        assert "[[So long«<|im_end|>»]]" in text


def test_system_prompt_is_put_before_conversations_without_one() -> None:
    text = shown(*encode({"messages": TWO_TURNS[1:3]}, CHATML, system_prompt="Be kind."))
    assert text.startswith("«<|im_start|>»system\nBe kind.«<|im_end|>»\n«<|im_start|>»user\nHi")
    text = shown(*encode({"messages": TWO_TURNS}, CHATML, system_prompt="Be kind."))
    assert "Be kind." not in text


def test_rows_without_an_answer_are_left_out_and_say_why() -> None:
    for messages in ([user("Hi")], [user("Hi"), assistant(" ")], []):
        found, _ = encode({"messages": messages}, CHATML)
        assert found.left_out == "no target"
        assert len(found.ids) == 0
    found, _ = encode({"prompt": "Hi", "completion": ""})
    assert found.left_out == "no target"


def test_tools_and_tool_calls_reach_the_template() -> None:
    template = (
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("1+1"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": None},
        assistant("It is 2"),
    ]
    row = {"messages": messages, "tools": '[{"name": "add"}]'}
    assert shown(*encode(row, template)) == (
        '{"name": "add"}«<|im_start|>»user\n1+1«<|im_end|>»«<|im_start|>»assistant\n'
        '[[{"name": "add", "arguments": {"a": 1}}«<|im_end|>»]]«<|im_start|>»tool\n2«<|im_end|>»'
        "«<|im_start|>»assistant\n[[It is 2«<|im_end|>»]]"
    )
    with pytest.raises(DataError, match=r"drops the tool call of message 1; .* 'add' is missing"):
        encode({"messages": messages}, CHATML)


def test_missing_end_of_turn_is_an_error_with_a_sample() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError) as caught:
        encode({"messages": TWO_TURNS[1:]}, bare)
    message = str(caught.value)
    assert "nothing tells the model to stop" in message
    assert "eos_token" in message
    assert message.endswith(r"user: Hi\nassistant: [[Hello!\n]]user: Bye\nassistant: [[So long\n]]")
    # After the last turn, the end-of-document token is what tells it.
    found, made = encode({"messages": TWO_TURNS[1:3]}, bare)
    assert shown(found, made) == "user: Hi\nassistant: [[Hello!\n]]"
    assert found.eos_is_target
    with pytest.raises(DataError, match="nothing tells the model to stop"):
        encode({"messages": TWO_TURNS[1:3]}, bare, append_eos=False)
    with pytest.raises(DataError, match="append_eos=true"):
        encode({"prompt": "a", "completion": "b"}, append_eos=False)


def test_marks_that_leave_out_the_end_of_turn_are_an_error() -> None:
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(DataError, match=r"put \{% endgeneration %\} behind .*\[\[Hello!\]\]<"):
        encode({"messages": TWO_TURNS[1:]}, template)


@pytest.mark.parametrize(
    "body",
    [
        "<|im_start|>{{ m.role }}\n{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}",
        "{{ turn(m) }}",
    ],
)
def test_marks_that_miss_the_answers_are_an_error(body: str) -> None:
    macro = (
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
    )
    template = macro + "{% for m in messages %}" + body + "{% endfor %}"
    with pytest.raises(DataError, match=r"does not mark all .*: message 1 is not .* of macros"):
        encode({"messages": TWO_TURNS[1:]}, template)


def test_generation_prompt_that_no_answer_starts_with_is_an_error() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(DataError) as caught:
        encode({"messages": TWO_TURNS[1:3]}, template)
    assert "writes message 1 (assistant) or what stands before it" in str(caught.value)
    assert "last_assistant" not in str(caught.value)
    thought = [user("1+1"), assistant("<think>\neasy</think>2")]
    found, made = encode({"messages": thought}, template)
    assert shown(found, made).endswith("<think>\n[[easy</think>2«<|im_end|>»]]\n")


def test_template_that_drops_text_is_an_error_with_a_sample() -> None:
    template = CHATML.replace("{% for message in messages %}", "{% for message in messages[1:] %}")
    with pytest.raises(DataError) as caught:
        encode({"messages": TWO_TURNS}, template)
    message = str(caught.value)
    assert "drops text: message 0 (system)" in message
    assert "'Be brief.' is missing" in message
    assert r"the row, targets in [[ ]]: <|im_start|>user\nHi<|im_end|>" in message


def test_rows_are_named_by_path_and_line(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "assistnt", "content": "Hi"}]}
    path = tmp_path / "role.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": TWO_TURNS}, bad)))
    source = FilesSourceConfig(paths=[str(path)])
    pieces = read_all(source, rows=True)
    encoder = InstructionEncoder(tokenizer(CHATML), InstructionsConfig())
    with pytest.raises(DataError) as caught:
        encoder.encode(pieces)
    start = len(path.read_text().splitlines(keepends=True)[0])
    place = f"{path}: line 2 (byte {start})"
    assert str(caught.value).startswith(f"{place}: messages[0]: role 'assistnt' is not known")
    with gzip.open(f"{path}.gz", "wt") as file:
        file.write(path.read_text())
    path.unlink()
    with pytest.raises(DataError, match=rf"^{path}\.gz: line 2 \(byte {start}\): messages"):
        encoder.encode(read_all(FilesSourceConfig(paths=[f"{path}.gz"]), rows=True))


def test_template_that_refuses_a_row_names_it() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    with pytest.raises(DataError, match=r"rows.jsonl, byte 213: the chat template .*: No system"):
        encode({"messages": TWO_TURNS}, template + CHATML)


def test_conversation_without_template_says_what_to_give() -> None:
    with pytest.raises(DataError, match=r"no chat template; .* dataset.instructions.chat_template"):
        encode({"messages": TWO_TURNS})


def test_merged_tokens_and_many_bytes_are_targets_by_position() -> None:
    found, made = encode({"prompt": "Grüße: ", "completion": "né 😀"})
    mask = found.is_target
    assert mask is not None
    assert mask.sum() == len("né 😀".encode())
    assert made.decode(found.ids[mask]) == "né 😀"


def test_encoding_is_the_same_row_by_row_and_at_once() -> None:
    made = tokenizer(CHATML)
    encoder = InstructionEncoder(made, InstructionsConfig())
    rows: list[dict[str, Any]] = [
        {"messages": TWO_TURNS},
        {"messages": [user("none")]},
        {"messages": [user("<|im_end|>"), assistant("yes")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    pieces = [Piece(f"r:{n}", row=row) for n, row in enumerate(rows)]
    together = encoder.encode(pieces)
    for piece, found in zip(pieces, together, strict=True):
        (alone,) = encoder.encode([piece])
        assert np.array_equal(alone.ids, found.ids)
        assert shown(alone, made) == shown(found, made)
        assert alone.left_out == found.left_out


def test_bos_and_eos_of_the_encoder_agree_with_the_ids() -> None:
    found, made = encode({"messages": TWO_TURNS[1:]}, "{{ bos_token }}" + ZEPHYR)
    assert found.starts_with_bos
    assert found.ids[0] == made.control_tokens[BOS]
    assert found.ends_with_eos
    assert found.ids[-1] == made.control_tokens[EOS]
    assert np.count_nonzero(found.ids == made.eos_id) == 4


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_literals_in_words_that_carry_their_space(
    scheme: Literal["first", "always", "never"],
) -> None:
    """SentencePiece's kind: a word at the start of a text has a space, others only a real one."""
    words = ["▁", "▁ab", "ab", "▁is", "<", "s", ">", "▁<", "a", "b", "\n", "[", "]", "U", "A"]
    backend = BackendTokenizer(
        models.Unigram([("<unk>", -9.0), *((word, -1.0) for word in words)], 0, False)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens(["<s>", "[U]", "[A]"])
    made = Tokenizer(backend, "<s>", {}).with_chat_template(
        "{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    encoder = InstructionEncoder(made, InstructionsConfig())
    rows = [
        {"messages": [user("ab ab"), assistant(answer)]} for answer in ("ab is <s> ab", "ab is ab")
    ]
    literal, plain = encoder.encode([Piece(f"r:{n}", row=row) for n, row in enumerate(rows)])
    for found in (literal, plain):
        assert np.count_nonzero(found.ids == made.eos_id) == 1
    # All before the name of the token, and all but the name, is what it is without it.
    same = len(plain.ids) - 2
    assert literal.ids[:same].tolist() == plain.ids[:same].tolist()
    assert literal.ids[-2:].tolist() == plain.ids[-2:].tolist()
    assert shown(literal, made).count("[[") == 1
