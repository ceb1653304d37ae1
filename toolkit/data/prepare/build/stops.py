"""Which tokens end a text: one answer for training's samples, `generate`, and whatever is exported.

They are the token that ends documents, the tokens that training taught as ends of an answer (what
the chat template writes there), and those that the model had as ends before, where its tokenizer
still has them as control tokens.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from toolkit.data.prepare.build.instructions import InstructionEncoder, chat_template
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.source_config import InstructionsConfig
from toolkit.errors import ToolkitError

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What config.json and generation_config.json call them."""

_ANSWER = "\N{REPLACEMENT CHARACTER}answer\N{REPLACEMENT CHARACTER}"
_TURN = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]


def stop_ids(tokenizer: Tokenizer, generation: Mapping[str, Any] | None = None) -> list[int]:
    """Ids after any of which a text is complete; the first ends documents, where the tokenizer has
    such a token.

    `generation` is generation_config.json of the model that training began from.
    """
    before = as_list((generation or {}).get("eos_token_id"))
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ends = [*own, *turn_ends(tokenizer), *(end for end in before if end in tokenizer.added_tokens)]
    return list(dict.fromkeys(ends))


def special_ids(
    tokenizer: Tokenizer, generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` as config.json and generation_config.json
    hold them.

    A text starts as the documents of the data do, else as the model's texts did before. Rows of a
    batch are filled up with the tokenizer's own token for that, else the model's, else the first
    stop token: `generate` takes it anyway, with a warning.
    """
    before = {
        key: value
        for key, value in (generation or {}).items()
        if isinstance(value, int) and value in tokenizer.added_tokens
    }
    ends = stop_ids(tokenizer, generation)
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else before.get("pad_token_id")
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer.prepends_bos else before.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ends[0] if pad is None and ends else pad,
    }


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the chat templates put after what the assistant says; none without a
    template."""
    found = []
    for text in tokenizer.chat_templates.values():
        found += _rendered_end(tokenizer, text)
        # A template may be of a kind that cannot be trained on here; the model was, elsewhere.
        with contextlib.suppress(ToolkitError):
            found += _trained_ends(tokenizer.with_chat_template(text))
    return list(dict.fromkeys(found))


def as_list(ids: Any) -> list[int]:
    """One id, several or none, as config.json writes them."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def _trained_ends(tokenizer: Tokenizer) -> list[int]:
    """The last target of each answer, as data is encoded: in the middle of a conversation and at
    its end."""
    row = {"messages": [*_TURN, *_TURN]}
    encoder = InstructionEncoder(tokenizer, InstructionsConfig(), append_eos=True)
    (encoded,) = encoder.encode([Piece(identity="", row=row)])
    if encoded.is_target is None:
        return []
    ids, is_target = encoded.ids.tolist(), [*encoded.is_target.tolist(), False]
    ends = [ids[n] for n in range(len(ids)) if is_target[n] and not is_target[n + 1]]
    return [end for end in ends if end in tokenizer.added_tokens]


def _rendered_end(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token right after an answer that ends a conversation."""
    try:
        rendered = chat_template(tokenizer, text).render(_TURN).text
    except ToolkitError:
        return []
    after = rendered.rpartition(_ANSWER)[2].lstrip()
    ((ids, _),) = tokenizer.encode_offsets([after], special_tokens=True)
    return [end for end in ids[:1].tolist() if end in tokenizer.added_tokens]
