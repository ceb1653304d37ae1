"""Configs of data: where text comes from, how it becomes tokens, how tokens become batches.

The configs of each room stand in its own `config.py`; they are named here too, as one place to
import them from.
"""

from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import Seed, check_positive
from toolkit.config.paths import LocalPath, NewName, PathOrURL
from toolkit.data.instances.config import (
    FixedInstancesConfig,
    InstancesConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.order.config import MixConfig, MixSourceConfig, RatioChangeConfig
from toolkit.data.source_config import (
    DiskSourceConfig,
    FilesSourceConfig,
    FiltersConfig,
    HubSourceConfig,
    InstructionsConfig,
    PythonStdlibSourceConfig,
    SourceConfig,
    TextSourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.tokenizer_config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    HFTokenizerConfig,
    SentencePieceTokenizerConfig,
    TiktokenTokenizerConfig,
    TokenizerConfig,
)

__all__ = [
    "BPETokenizerConfig",
    "ByteTokenizerConfig",
    "CustomDatasetConfig",
    "DataConfig",
    "DataLoaderConfig",
    "DatasetConfig",
    "DiskSourceConfig",
    "FilesSourceConfig",
    "FiltersConfig",
    "FixedInstancesConfig",
    "HFTokenizerConfig",
    "HubSourceConfig",
    "InstancesConfig",
    "InstructionsConfig",
    "MixConfig",
    "MixSourceConfig",
    "PackedInstancesConfig",
    "PaddedInstancesConfig",
    "PythonStdlibSourceConfig",
    "RatioChangeConfig",
    "SentencePieceTokenizerConfig",
    "SourceConfig",
    "StoreConfig",
    "TextSourceConfig",
    "TiktokenTokenizerConfig",
    "TokenFilesSourceConfig",
    "TokenizerConfig",
    "VariableInstancesConfig",
]


class CustomDatasetConfig(Config, kw_only=True):
    """A data set written in Python, in place of token files; docs/data.md gives the protocol."""

    target: str
    """`module:Class`, imported from the Python path or the current folder."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Keyword arguments of the class; `split` ("train" or "val") and `sequence_length` are added
    where it takes them."""


class DatasetConfig(Config, kw_only=True):
    """A tokenized corpus: `<root>/<dataset_name>/<dataset_config>/{train,val}.bin`."""

    root: LocalPath = "data"
    """Folder of all tokenized corpora (`--data-root`)."""
    dataset_name: NewName = "corpus"
    """First folder level: which text."""
    dataset_config: NewName = "default"
    """Second folder level: which tokenizer and settings."""
    source: SourceConfig | None = None
    """Where the text comes from; null: the token files exist already and are taken as they are,
    with the tokenizer and the split they were made with."""
    mix: MixConfig | None = None
    """Several corpora in given shares, in place of one."""
    custom: CustomDatasetConfig | None = None
    """A data set written in Python, in place of token files."""
    tokenizer: TokenizerConfig | None = ByteTokenizerConfig()
    """How text becomes ids; null only for token files whose tokenizer is not at hand."""
    filters: FiltersConfig | None = None
    """Which documents are left out."""
    deduplicate: bool = False
    """Leave out documents whose text was there before, byte for byte."""
    instructions: InstructionsConfig | None = None
    """For rows that are conversations or prompts with answers: how they are rendered, and what of
    them the loss counts."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of each document's identity. Of plain-text
    files too few to hold one out, the last part of each is held out."""
    append_eos: bool = True
    """End every document with the tokenizer's end-of-document token."""
    prepend_bos: bool = False
    """Start every document with the tokenizer's start-of-document token."""
    sequence_length: int = 1024
    """Tokens per instance (`--sequence-length`); labels are shifted inside, so each instance has
    one target less."""
    instances: InstancesConfig = FixedInstancesConfig()
    """How training documents become instances."""
    eval_instances: FixedInstancesConfig | PackedInstancesConfig | PaddedInstancesConfig | None = (
        None
    )
    """How validation documents become instances; default: as in training; fixed with
    `intra_document_masking` where that is variable."""
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
        given = [name for name in ("source", "mix", "custom") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        if self.tokenizer is None and not (
            self.source is None or isinstance(self.source, TokenFilesSourceConfig)
        ):
            raise ValueError("tokenizer may be null only for a source of type token_files")


class DataLoaderConfig(Config, kw_only=True):
    """How batches are drawn from the instances."""

    global_batch_size: int = 65_536
    """Tokens per optimizer step over all ranks."""
    eval_batch_size: int | None = None
    """Tokens per evaluation forward on one rank; default: the training microbatch."""
    eval_tokens: int | None = 1_048_576
    """Validation tokens per evaluation (the first ones, always the same); null: all."""
    seed: Seed | None = None
    """Seed of the data order; default: the experiment's `seed`."""
    shuffle: bool = True
    """False: instances in file order (every epoch the same)."""
    prefetch_factor: int = 4
    """Batches kept ready by the background reader; 0: read in the training thread."""
    num_workers: int = 0
    """Workers that read a custom data set's items; 0: the background reader itself. Token files
    need none."""
    worker_type: Literal["process", "thread"] = "process"
    """Processes for items made in Python, threads for items that wait for a disk or a network."""

    def __post_init__(self) -> None:
        check_positive(self, "global_batch_size", "eval_batch_size", "eval_tokens")
        for name in ("prefetch_factor", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")


class StoreConfig(Config, kw_only=True):
    """Where token files are kept for good, and where copies of them lie for training."""

    permanent_root: PathOrURL | None = None
    """The source of truth, `<permanent_root>/<dataset_name>/<dataset_config>/`: a folder (NFS, a
    mounted drive) or a URL (`s3://`, `gs://`, `gdrive://`, anything fsspec knows). What is there
    is copied to this machine; what is built here is copied there. null: local folders are all
    there is."""
    tokenized_cache_dir: LocalPath | None = None
    """Local folder of the copies that training reads; default: `dataset.root`."""
    hf_cache_dir: LocalPath | None = None
    """Local folder of raw texts from the Hugging Face hub; default: its own."""
    max_cache_gb: float | None = None
    """Most gigabytes (1e9 bytes) of each of the two folders; what was used longest ago goes first.
    null: no limit. Token files go only if a verified permanent copy exists and no live process uses
    them."""

    def __post_init__(self) -> None:
        check_positive(self, "max_cache_gb")


class DataConfig(Config, kw_only=True):
    """What `get_dataloaders` needs: the corpus and how batches are drawn from it."""

    dataset: DatasetConfig = DatasetConfig()
    data_loader: DataLoaderConfig = DataLoaderConfig()
    store: StoreConfig = StoreConfig()
    seed: Seed = 0
    """Seed of the data order when `data_loader.seed` is null."""
