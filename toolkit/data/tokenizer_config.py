"""Configs of tokenizers."""

from toolkit.config import Config
from toolkit.config.base import check_positive
from toolkit.config.paths import LocalPath


class ByteTokenizerConfig(Config, kw_only=True, tag_field="type", tag="byte"):
    """Ids 0 to 255 are bytes, 256 ends a document."""


class BPETokenizerConfig(Config, kw_only=True, tag_field="type", tag="bpe"):
    """Byte-level BPE trained on the corpus itself."""

    vocab_size: int = 4096
    """Size including the end-of-document token."""
    sample_bytes: int = 20_000_000
    """Text to train on, in bytes; bounds memory and time on large corpora."""

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes + eos): {self.vocab_size}"
            )
        check_positive(self, "sample_bytes")


class HFTokenizerConfig(Config, kw_only=True, tag_field="type", tag="hf"):
    """A tokenizer in Hugging Face format."""

    path: LocalPath
    """Folder, `tokenizer.json` file, or hub name."""
    eos_token: str | None = None
    """Token that ends a document; default: the tokenizer's own."""
    bos_token: str | None = None
    """Token that starts a document where `dataset.prepend_bos` is set; default: the tokenizer's
    own."""

    @property
    def is_local(self) -> bool:
        """Whether `path` cannot be a name on the hub."""
        return self.path.startswith(("/", ".", "~")) or self.path.count("/") > 1


class TiktokenTokenizerConfig(Config, kw_only=True, tag_field="type", tag="tiktoken"):
    """A rank file of tiktoken: lines of base64 bytes and a rank."""

    path: LocalPath
    """The file (`cl100k_base.tiktoken`, Llama 3's `tokenizer.model`, ...)."""
    pattern: str = "gpt2"
    """How text is cut before merging: the name of a known pattern (gpt2, cl100k_base, o200k_base,
    llama3), or a regular expression."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Control tokens; they get the ids after the last rank, in this order."""
    eos_token: str = "<|endoftext|>"
    """Token that ends a document; one of `special_tokens`."""
    bos_token: str | None = None
    """Token that starts a document where `dataset.prepend_bos` is set."""

    def __post_init__(self) -> None:
        for name in ("eos_token", "bos_token"):
            token = getattr(self, name)
            if token is not None and token not in self.special_tokens:
                raise ValueError(f"{name} {token!r} is not one of special_tokens")


class SentencePieceTokenizerConfig(Config, kw_only=True, tag_field="type", tag="sentencepiece"):
    """A SentencePiece model: BPE or unigram."""

    path: LocalPath
    """The file (`tokenizer.model`, `spiece.model`)."""
    eos_token: str | None = None
    """Token that ends a document; default: the model's own (`</s>`)."""
    bos_token: str | None = None
    """Token that starts a document where `dataset.prepend_bos` is set; default: the model's
    own (`<s>`)."""


TokenizerConfig = (
    ByteTokenizerConfig
    | BPETokenizerConfig
    | HFTokenizerConfig
    | TiktokenTokenizerConfig
    | SentencePieceTokenizerConfig
)
