"""Configs of data: where text comes from, how it becomes tokens, how tokens become batches."""

from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_positive


class FilesSourceConfig(Config, kw_only=True, tag_field="type", tag="files"):
    """Local text: .txt, .jsonl, .jsonl.gz or .parquet files."""

    paths: list[str]
    """Files, folders (searched recursively) or globs; order does not matter, names are sorted."""
    text_field: str = "text"
    """Column or key that holds the text in .jsonl and .parquet."""
    suffixes: tuple[str, ...] = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
    """Endings taken from folders. Endings not known as a format are read as plain text, one
    document per file."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: stop, or replace with U+FFFD and count them."""


class HubSourceConfig(Config, kw_only=True, tag_field="type", tag="hub"):
    """A data set of the Hugging Face hub (or any path `datasets.load_dataset` takes)."""

    name: str
    """Hub name or local path."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    split: str = "train"
    """Split to read."""
    text_field: str = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read without downloading the whole data set first."""


class PythonStdlibSourceConfig(Config, kw_only=True, tag_field="type", tag="python_stdlib"):
    """Source code of the running interpreter's standard library: real text on every machine."""

    max_bytes: int | None = 10_000_000
    """Stop after this many bytes (files in sorted order by hash of their name); null: all."""


SourceConfig = FilesSourceConfig | HubSourceConfig | PythonStdlibSourceConfig


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


TokenizerConfig = ByteTokenizerConfig | BPETokenizerConfig | HFTokenizerConfig


class DatasetConfig(Config, kw_only=True):
    """A tokenized corpus: `<root>/<dataset_name>/<dataset_config>/{train,val}.bin`."""

    root: str = "data"
    """Folder of all tokenized corpora (`--data-root`)."""
    dataset_name: str = "corpus"
    """First folder level: which text."""
    dataset_config: str = "default"
    """Second folder level: which tokenizer and settings."""
    source: SourceConfig | None = None
    """Where the text comes from; null: the token files exist already and are taken as they are,
    with the tokenizer and the split they were made with."""
    tokenizer: TokenizerConfig = ByteTokenizerConfig()
    """How text becomes ids."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of each document's identity. Of plain-text
    files too few to hold one out, the last part of each is held out."""
    append_eos: bool = True
    """End every document with the tokenizer's end-of-document token."""
    sequence_length: int = 1024
    """Tokens per instance (`--sequence-length`); labels are shifted inside, so each instance has
    one target less."""
    num_processes: int | None = None
    """Processes for `prepare`; default: all cores."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {self.sequence_length}")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1): {self.validation_fraction}")
        check_positive(self, "num_processes")
        for field in ("dataset_name", "dataset_config"):
            value = getattr(self, field)
            if not value or ".." in value.split("/") or value.startswith("/"):
                raise ValueError(f"{field} must be a relative folder name, not {value!r}")


class DataLoaderConfig(Config, kw_only=True):
    """How batches are drawn from the instances."""

    global_batch_size: int = 65_536
    """Tokens per optimizer step over all ranks."""
    eval_batch_size: int | None = None
    """Tokens per evaluation forward on one rank; default: the training microbatch."""
    eval_tokens: int | None = 1_048_576
    """Validation tokens per evaluation (the first ones, always the same); null: all."""
    seed: int | None = None
    """Seed of the data order; default: the experiment's `seed`."""
    shuffle: bool = True
    """False: instances in file order (every epoch the same)."""
    prefetch_factor: int = 4
    """Batches kept ready by the background reader; 0: read in the training thread."""

    def __post_init__(self) -> None:
        check_positive(self, "global_batch_size", "eval_batch_size", "eval_tokens")
        if self.prefetch_factor < 0:
            raise ValueError(f"prefetch_factor must not be negative: {self.prefetch_factor}")


class DataConfig(Config, kw_only=True):
    """What `get_dataloaders` needs: the corpus and how batches are drawn from it."""

    dataset: DatasetConfig = DatasetConfig()
    data_loader: DataLoaderConfig = DataLoaderConfig()
    seed: int = 0
    """Seed of the data order when `data_loader.seed` is null."""
