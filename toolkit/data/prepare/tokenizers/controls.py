"""Ordinary text stays ordinary: no text becomes a control token because it spells its name.

`tokenizers` can leave names of control tokens alone when it looks for added tokens
(`encode_special_tokens`). That is enough where the model itself cannot make them, as in byte-level
BPE. Others can: a unigram or word-level vocabulary holds `</s>` as an entry like any other. For
them, text is encoded by a twin of the tokenizer whose control tokens have names that no text has;
ids stay what they are.
"""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer


def ordinary_backend(backend: "BackendTokenizer", more: Sequence[str]) -> "BackendTokenizer":
    """What encodes documents: `backend` itself where that is safe, or a twin of it.

    Args:
        more: tokens that count as control tokens whether they are marked so or not.
    """
    backend.encode_special_tokens = True
    added = backend.get_added_tokens_decoder().values()
    names = sorted({token.content for token in added if token.special}.union(more))
    ids = {backend.token_to_id(name) for name in names}
    texts = [text for name in names for text in (name, f" {name}", f"{name}a", f"a{name}b")]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    if any(not ids.isdisjoint(encoding.ids) for encoding in encodings):
        return _twin(backend, set(names))
    return backend


def _twin(backend: "BackendTokenizer", names: set[str]) -> "BackendTokenizer":
    from tokenizers import Tokenizer as BackendTokenizer

    # Made up anew in every process, so that no document can be written to hold it.
    mark = secrets.token_hex(16)
    data: dict[str, Any] = msgspec.json.decode(backend.to_str())
    model = data["model"]

    def renamed(name: str) -> str:
        return f"{name}{mark}" if name in names else name

    for token in data["added_tokens"]:
        token["content"] = renamed(token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(name), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.isdisjoint([*pair, "".join(pair)])]
    data["post_processor"] = None
    twin = BackendTokenizer.from_str(msgspec.json.encode(data).decode())
    twin.encode_special_tokens = True
    return twin
