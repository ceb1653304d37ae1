"""Configs of data: how text becomes tokens, tokens become rows, and rows become batches.

Where text comes from is in `source_config.py`, mixtures are in `order/config.py`; what those hold
can be imported from here too.
"""

from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import Seed, check_positive
from toolkit.config.paths import LocalPath, NewName, PathOrURL
from toolkit.data.order.config import (  # noqa: F401
    MixConfig,
    MixSourceConfig,
    RatioChangeConfig,
)
from toolkit.data.order.plan import Phase
from toolkit.data.order.schedule import (
    BatchSizeChangeConfig,
    SequenceLengthChangeConfig,
    Values,
    check_changes,
    phases_of,
    values_of,
)
from toolkit.data.source_config import (  # noqa: F401
    DiskSourceConfig,
    EvalSetConfig,
    FilesSourceConfig,
    FiltersConfig,
    HubSourceConfig,
    InstructionsConfig,
    PythonStdlibSourceConfig,
    SourceConfig,
    TextSourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.tokens.units import UNIT_OF, UnitKind
from toolkit.storage.urls import check_stores


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


TOKENIZER_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"type": "hf", "path": "openai-community/gpt2"},
    "dolma2": {"type": "hf", "path": "allenai/dolma2-tokenizer"},
}
"""Name that may stand for a tokenizer -> what it stands for; 50,257 and 100,278 ids."""


class FixedInstancesConfig(Config, kw_only=True, tag_field="type", tag="fixed"):
    """All documents one after the other, cut every `sequence_length` tokens."""

    intra_document_masking: bool = False
    """Attention inside documents only, and no loss on the first token of a document."""


class PackedInstancesConfig(Config, kw_only=True, tag_field="type", tag="packed"):
    """Whole documents, as many as fit into `sequence_length` (best fit, decreasing; Ding et al.
    2024). Longer documents are cut into full rows, and only their rest is packed. Attention stays
    inside documents."""


class PaddedInstancesConfig(Config, kw_only=True, tag_field="type", tag="padded"):
    """One document each, padded to `sequence_length`; longer ones are cut into several rows."""


class VariableInstancesConfig(Config, kw_only=True, tag_field="type", tag="variable"):
    """Documents cut into powers of two; each batch has rows of one length (dataset decomposition,
    Pouransari et al. 2024)."""

    min_sequence_length: int = 256
    """Shortest row, a power of two; shorter rests of documents are dropped and counted."""
    curriculum: Literal["natural", "grow", "shrink"] = "grow"
    """Order of lengths: at random, or from short to long (or back) in each of `num_cycles`."""
    num_cycles: int = 8
    """Times that lengths run from one end to the other in one epoch."""

    def __post_init__(self) -> None:
        check_positive(self, "min_sequence_length", "num_cycles")
        if self.min_sequence_length < 2 or self.min_sequence_length.bit_count() != 1:
            raise ValueError(
                f"min_sequence_length must be a power of two, 2 or more: {self.min_sequence_length}"
            )


InstancesConfig = (
    FixedInstancesConfig | PackedInstancesConfig | PaddedInstancesConfig | VariableInstancesConfig
)


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
    eval_sets: dict[str, EvalSetConfig] = msgspec.field(default_factory=dict)
    """Further texts that `lm_evaluator` scores, by the name that they have in eval.jsonl."""
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
        if self.eval_sets and self.custom is not None:
            raise ValueError(
                "eval_sets go with token files; a custom data set gives its validation rows itself"
            )
        if "val" in self.eval_sets:
            raise ValueError(
                "eval_sets: val is what held-out documents are called; choose another name"
            )
        given = [name for name in ("source", "mix", "custom") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        for field in ("instances", "eval_instances"):
            kind = getattr(self, field)
            if self.unit is not None and isinstance(
                kind, FixedInstancesConfig | VariableInstancesConfig
            ):
                raise ValueError(
                    f"{field} of type {kind.__struct_config__.tag} cut documents, and those of "
                    f"{self.unit} data (instructions.kind) stay whole; set {field} to "
                    "{type: packed} or {type: padded}"
                )
        if self.tokenizer is None and not (
            self.source is None or isinstance(self.source, TokenFilesSourceConfig)
        ):
            raise ValueError("tokenizer may be null only for a source of type token_files")

    @property
    def unit(self) -> UnitKind | None:
        """What rows of preference or binary data become; None: these are others."""
        return None if self.instructions is None else UNIT_OF.get(self.instructions.kind)


class DataLoaderConfig(Config, kw_only=True):
    """How batches are drawn from the instances."""

    global_batch_size: int = 65_536
    """Tokens per optimizer step over all ranks."""
    batch_size_schedule: tuple[BatchSizeChangeConfig, ...] = ()
    """Other batch sizes from given points of training on; `global_batch_size` is the first."""
    sequence_length_schedule: tuple[SequenceLengthChangeConfig, ...] = ()
    """Shorter rows until given points of training: instances of `dataset.sequence_length` tokens
    are cut into equal parts. For `dataset.instances` of type fixed."""
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
        lines = check_changes("batch_size_schedule", self.batch_size_schedule, "global_batch_size")
        changes = self.sequence_length_schedule
        lines += check_changes("sequence_length_schedule", changes, "sequence_length")
        if lines:
            raise ValueError("\n".join(lines))

    @property
    def batch_sizes(self) -> Values:
        """(tokens seen, tokens per optimizer step from there on)."""
        return values_of(self.batch_size_schedule, "global_batch_size", self.global_batch_size)

    @property
    def first_batch_size(self) -> int:
        """Tokens of the first optimizer step."""
        return self.batch_sizes[0][1]

    @property
    def batch_size_keys(self) -> list[str]:
        """What gives each of `batch_sizes`."""
        places = [change.tokens for change in self.batch_size_schedule]
        keys = [f"batch_size_schedule.{n}.global_batch_size" for n in range(len(places))]
        first = [] if places[:1] == [0] else ["global_batch_size"]
        return [f"data_loader.{key}" for key in (*first, *keys)]

    def sequence_lengths(self, sequence_length: int) -> Values:
        """(tokens seen, tokens of a row from there on), of instances of `sequence_length`."""
        return values_of(self.sequence_length_schedule, "sequence_length", sequence_length)

    def phases(self, sequence_length: int) -> list[Phase]:
        """The sizes of batches and rows over the run, in instances of `sequence_length`."""
        lengths = self.sequence_lengths(sequence_length)
        return phases_of(self.batch_sizes, lengths, sequence_length)


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
        check_stores(self, "permanent_root")


class DataConfig(Config, kw_only=True):
    """What `get_dataloaders` needs: the corpus and how batches are drawn from it."""

    dataset: DatasetConfig = DatasetConfig()
    data_loader: DataLoaderConfig = DataLoaderConfig()
    store: StoreConfig = StoreConfig()
    seed: Seed = 0
    """Seed of the data order when `data_loader.seed` is null."""

    @property
    def phases(self) -> list[Phase]:
        """The sizes of batches and rows over the run, in instances."""
        return self.data_loader.phases(self.dataset.sequence_length)
