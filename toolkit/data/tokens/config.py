"""Configs of tokens: tokenizers, and where token files are kept."""

from toolkit.config import Config
from toolkit.config.base import check_positive


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

    path: str
    """Folder, `tokenizer.json` file, or hub name."""
    eos_token: str | None = None
    """Token that ends a document; default: the tokenizer's own."""
    bos_token: str | None = None
    """Token that starts a document where `dataset.prepend_bos` is set; default: the tokenizer's
    own."""


class TiktokenTokenizerConfig(Config, kw_only=True, tag_field="type", tag="tiktoken"):
    """A rank file of tiktoken: lines of base64 bytes and a rank."""

    path: str
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

    path: str
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


class StoreConfig(Config, kw_only=True):
    """Where token files are kept for good, and where copies of them lie for training."""

    permanent_root: str | None = None
    """The source of truth, `<permanent_root>/<dataset_name>/<dataset_config>/`: a folder (NFS, a
    mounted drive) or a URL (`s3://`, `gs://`, `gdrive://`, anything fsspec knows). What is there
    is copied to this machine; what is built here is copied there. null: local folders are all
    there is."""
    tokenized_cache_dir: str | None = None
    """Local folder of the copies that training reads; default: `dataset.root`."""
    hf_cache_dir: str | None = None
    """Local folder of raw texts from the Hugging Face hub; default: its own."""
    max_cache_gb: float | None = None
    """Most gigabytes (1e9 bytes) of each of the two folders; what was used longest ago goes first.
    null: no limit. Token files go only if a verified permanent copy exists and no live process uses
    them."""

    def __post_init__(self) -> None:
        check_positive(self, "max_cache_gb")
