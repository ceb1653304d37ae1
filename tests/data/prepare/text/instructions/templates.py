"""Chat templates in the styles that are in use, and a tokenizer that knows their control tokens."""

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers

from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}"
    "{% endfor %}"
)
# Reasoning of all but the last turn goes, as in templates of reasoning models.
THINKING = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{%- else -%}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
# No generation prompt, and one token more at the end of the whole conversation.
CLOSING = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>"
    "{% endfor %}{{ eos_token }}"
)

EOS = "<|endoftext|>"
BOS = "<s>"
CONTROLS = (
    EOS, BOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|message|>", "<|channel|>",
    "<|end|>", "<|return|>", "<|call|>",
)  # fmt: skip


def tokenizer(template: str | None = None, *, eos_token: str = EOS) -> Tokenizer:
    """One id for each byte (0 to 255), and control tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = BackendTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROLS))
    made = Tokenizer(backend, eos_token, {}, bos_token=BOS)
    return made if template is None else made.with_chat_template(template)


def user(content: str) -> dict[str, str]:
    """What a user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """What the assistant says."""
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    """What stands before a conversation."""
    return {"role": "system", "content": content}
