"""Moved to `tokenizer`."""

from toolkit.data.prepare.tokenizers.tokenizer import train_bpe as train_bpe
