"""The tokenizer that needs no training: bytes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE, Files
from toolkit.data.prepare.tokenizers.tokenizer import BYTE_MARK, EOS_TOKEN, Tokenizer, fast_config

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as BackendTokenizer


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    def __init__(self, files: Files | None = None) -> None:
        from tokenizers import Tokenizer as BackendTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([EOS_TOKEN])
        own: Files = {TOKENIZER_CONFIG_FILE: {**fast_config(), BYTE_MARK: True}}
        super().__init__(backend, EOS_TOKEN, files or own)

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Bytes of each text; uint8 arrays."""
        import numpy as np

        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def is_outgrown_by(self, backend: "BackendTokenizer") -> bool:
        """Whether `backend` is this one with added tokens, which this kind does not have."""
        ours, theirs = (b.get_vocab(with_added_tokens=True) for b in (self._backend, backend))
        return ours.items() < theirs.items()


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, next_free = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(next_free))
            next_free += 1
    return characters
