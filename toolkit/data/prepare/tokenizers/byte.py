"""Moved to `tokenizer` and `fast_bpe`."""

from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters as byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer as ByteTokenizer
