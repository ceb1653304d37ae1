"""How many bytes of text each token stands for."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as BackendTokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(backend: "BackendTokenizer") -> "np.ndarray":
    """UTF-8 bytes of each id's text, int32 of shape `(vocab_size,)`; 0 for control tokens and ids
    that are none.

    Exact for byte-level vocabularies, whose tokens have one character for each byte. Elsewhere a
    space that the tokenizer puts before a text counts too, and normalisation does not.
    """
    import numpy as np

    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    decoder = backend.decoder
    is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int32)
    for token, number in vocabulary.items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif is_byte_level:
            sizes[number] = len(token)
        elif _BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            text = token.removeprefix("##").replace("▁", " ")
            sizes[number] = len(text.encode("utf-8", "surrogatepass"))
    return sizes
