"""Which tokens end a text: those of documents, of answers, and those that ended texts before."""

import re

import pytest
from tokenizers import Tokenizer as BackendTokenizer

from toolkit.data.prepare.build.stops import special_ids, stop_ids, turn_ends
from toolkit.data.prepare.tokenizers.tokenizer import EOS_TOKEN, ByteTokenizer, Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, ["<|im_end|>"]),
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|eot_id|>"],
    ),
    "gemma": (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<end_of_turn>"],
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ["</s>"],
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        ["</s>"],
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|end|>", EOS_TOKEN],
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [EOS_TOKEN],
    ),
    "marked": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}\n{% endfor %}",
        ["<|im_end|>"],
    ),
    # Nobody can train on several turns of it here; the model may have learned it elsewhere.
    "forgetful": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not "
        "loop.last %}...{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
        ["<|im_end|>"],
    ),
    "without an end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
    "refusing": ("{{ raise_exception('no') }}<|im_end|>", []),
}


def with_template(text: str, *, special: bool = True, **config: object) -> Tokenizer:
    """Bytes and `<|endoftext|>`, the names in the template and those of roles as tokens."""
    backend = BackendTokenizer.from_str(ByteTokenizer()._backend.to_str())
    names = sorted({*re.findall(r"<\|?[a-z_0-9]+\|?>|</s>", text), "<|user|>", "<|assistant|>"})
    (backend.add_special_tokens if special else backend.add_tokens)(names)
    files = {"tokenizer_config.json": {"eos_token": EOS_TOKEN, **config}}
    return Tokenizer(backend, EOS_TOKEN, files).with_chat_template(text)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_an_answer_is_found(name: str, special: bool) -> None:
    text, expected = TEMPLATES[name]
    tokenizer = with_template(text, special=special)
    assert [tokenizer.decode([end]) for end in turn_ends(tokenizer)] == expected
    ends = [EOS_TOKEN, *(end for end in expected if end != EOS_TOKEN)]
    assert [tokenizer.decode([end]) for end in stop_ids(tokenizer)] == ends


def test_what_ended_texts_before_still_does_where_it_is_a_token_of_its_own() -> None:
    tokenizer = with_template(CHATML)
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    assert stop_ids(tokenizer, {"eos_token_id": [start, 7, 256]}) == [256, end, start]
    assert stop_ids(tokenizer, {"eos_token_id": 7}) == [256, end]
    assert stop_ids(ByteTokenizer(), {"eos_token_id": None}) == [256]


def test_special_ids_agree_with_the_tokenizer() -> None:
    tokenizer = with_template(CHATML)
    end = tokenizer.id_of("<|im_end|>")
    before = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 5}
    assert special_ids(tokenizer, before) == {
        "bos_token_id": 256,
        "eos_token_id": [256, end],
        "pad_token_id": 256,
    }
    padded = with_template(CHATML, pad_token={"content": "<|im_start|>"})
    assert special_ids(padded)["pad_token_id"] == padded.id_of("<|im_start|>")
    assert special_ids(ByteTokenizer())["eos_token_id"] == 256
