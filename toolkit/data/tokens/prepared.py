"""A prepared data set on disk: what its files are, how they are read and checked.

    <root>/<dataset_name>/<dataset_config>/
      dataset.json      `Manifest`: counts, types, fingerprints, the settings it was built with
      train.bin         token ids of all training documents, one after the other
      train.idx         uint64: position in train.bin where each document starts
      train.mask        uint8: 1 for each token that the loss asks for; only of instruction data
                        (of preference and binary data 1 to 3, see `units.py`)
      val.*             the same for held-out documents; absent when there are none
      tokenizer/        loads with `transformers.AutoTokenizer`

The folder gets its name in one rename when everything in it is complete, so a folder that exists is
whole. Reading the manifest needs neither numpy nor any file but dataset.json.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from toolkit.data.config import DatasetConfig, StoreConfig
from toolkit.data.tokens.audit import TargetAudit
from toolkit.data.tokens.in_use import UseMark, mark_used
from toolkit.data.tokens.units import DOCUMENTS, UnitKind
from toolkit.errors import ConfigError, DataError
from toolkit.storage.foreign import guard, read_json
from toolkit.storage.remote import is_url
from toolkit.wording import count

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"
NUM_BLOCKS = 64
BLOCK_BYTES = 4096
NUM_BLOCKS_CHECKED_AT_OPEN = 4

TokenDType = Literal["uint16", "uint32"]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


class SplitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Counts and hashes of one split."""

    num_tokens: Annotated[int, msgspec.Meta(ge=1)]
    """Token ids in the .bin file, end-of-document tokens included."""
    num_documents: Annotated[int, msgspec.Meta(ge=1)]
    """Documents, and entries of the .idx file."""
    text_bytes: int
    """UTF-8 bytes of the text that became these tokens; 0 where they came without text."""
    content_hash: str
    """xxh3_128 of the whole .bin file."""
    block_hashes: Annotated[list[str], msgspec.Meta(min_length=NUM_BLOCKS)]
    """xxh3_64 of a few blocks spread over the .bin file, for a quick check when it is opened."""
    index_hash: str | None = None
    """xxh3_128 of the .idx file."""
    mask_hash: str | None = None
    """xxh3_128 of the .mask file; None where the loss asks for every token."""
    num_targets: int | None = None
    """Tokens the loss asks for; None: all."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Content of dataset.json."""

    format_version: int
    dtype: TokenDType
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    eos_id: int | None
    append_eos: bool
    bos_id: int | None = None
    prepend_bos: bool = False
    tokenizer_fingerprint: str
    tokenizer_checked: str | None = None
    """The release of `transformers` whose `AutoTokenizer` gives the same ids of tokenizer/ on text
    that is hard for tokenizers; None: it was not asked."""
    source_fingerprint: str
    """Identifies the text: names, sizes and sampled content of the source's files."""
    replaced_bytes: int
    """Bytes that were not UTF-8 and became U+FFFD."""
    skipped_documents: int
    """Documents and files without text, and files of the standard library that are not UTF-8."""
    cut_documents: int = 0
    """Documents that begin where one of more than 8 MB was cut."""
    filtered_documents: dict[str, int] = {}
    """Documents left out on purpose, by the reason."""
    left_out_files: dict[str, int] = {}
    """Files left out of the source's folders, by their ending."""
    audit: TargetAudit | None = None
    """Of instruction data: what the loss counts."""
    unit: UnitKind | msgspec.UnsetType = msgspec.UNSET
    """Of preference and binary data: what two documents that follow each other are."""
    settings: dict[str, Any]
    """The settings that decide what the files hold; see `toolkit.data.prepare.build.settings`."""
    splits: dict[str, SplitInfo]


class StoredFile(msgspec.Struct, frozen=True):
    """What a file of a data set must be."""

    size: int
    """Bytes."""
    xxh3: str | None
    """xxh3_128; None where it is not known."""


def token_files(dtype: TokenDType, splits: Mapping[str, SplitInfo]) -> dict[str, StoredFile]:
    """The token files of `splits`, by their names."""
    itemsize = 2 if dtype == "uint16" else 4
    files = {}
    for split, info in splits.items():
        files[f"{split}.bin"] = StoredFile(info.num_tokens * itemsize, info.content_hash)
        files[f"{split}.idx"] = StoredFile(info.num_documents * 8, info.index_hash)
        if info.mask_hash is not None:
            files[f"{split}.mask"] = StoredFile(info.num_tokens, info.mask_hash)
    return files


class PreparedDataset:
    """An opened manifest; token files are opened (and checked) when they are asked for."""

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.in_use: UseMark | None = None
        """Keeps the folder from being removed; set by `ensure_prepared`."""

    @property
    def vocab_size(self) -> int:
        """Every id in the files is below this."""
        return self.manifest.vocab_size

    @property
    def unit(self) -> UnitKind | None:
        """What two documents that follow each other are; None: each stands for itself."""
        unit = self.manifest.unit
        return None if unit is msgspec.UNSET else unit

    def num_units(self, split: Split) -> int:
        """Units of the split; 0 where there are none."""
        return self.num_documents(split) // DOCUMENTS if self.unit is not None else 0

    @property
    def tokenizer_folder(self) -> Path | None:
        """What `load_tokenizer` and `AutoTokenizer` read; None: the tokens came without one."""
        folder = self.folder / TOKENIZER_FOLDER
        return folder if folder.is_dir() else None

    def has_split(self, split: Split) -> bool:
        return split in self.manifest.splits

    def num_tokens(self, split: Split) -> int:
        """Tokens of the split, 0 when it is absent."""
        return self.manifest.splits[split].num_tokens if self.has_split(split) else 0

    def num_documents(self, split: Split) -> int:
        """Documents of the split, 0 when it is absent."""
        return self.manifest.splits[split].num_documents if self.has_split(split) else 0

    def bytes_per_token(self, split: Split) -> float:
        """UTF-8 bytes of text per token id, on average; 0.0 where the tokens came without text."""
        return self.manifest.splits[split].text_bytes / self.num_tokens(split)

    def fingerprint(self, split: Split) -> str:
        """Identifies the content of the split: tokens, type, tokenizer and eos policy."""
        import xxhash

        info, manifest = self.manifest.splits[split], self.manifest
        identity = (
            info.content_hash,
            info.num_tokens,
            manifest.dtype,
            manifest.tokenizer_fingerprint,
            manifest.append_eos,
            *(["bos"] if manifest.prepend_bos else []),
            *([] if info.mask_hash is None else [info.mask_hash]),
            *([] if self.unit is None else [self.unit]),
        )
        return xxhash.xxh3_64_hexdigest(repr(identity).encode())

    def tokens(self, split: Split) -> "np.ndarray":
        """Token ids of the split, a read-only memory map of shape `(num_tokens,)`. DataError: its
        size or a sampled block is not the manifest's."""
        tokens = self._map(f"{split}.bin", self.manifest.dtype)
        every = NUM_BLOCKS // (NUM_BLOCKS_CHECKED_AT_OPEN - 1)
        path, blocks = self.folder / f"{split}.bin", self.manifest.splits[split].block_hashes
        for number, found in hash_blocks(path, every).items():
            if blocks[number] != found:
                raise DataError(
                    f"{path}: content differs from {MANIFEST_NAME} beside it (sampled block "
                    f"{number}); restore it, or delete {self.folder} and prepare the data again"
                )
        return tokens

    def document_starts(self, split: Split) -> "np.ndarray":
        """Position of each document's first token, a memory map of shape `(num_documents,)`."""
        return self._map(f"{split}.idx", "uint64")

    def target_mask(self, split: Split) -> "np.ndarray | None":
        """1 for each token that the loss asks for, a memory map of uint8, shape `(num_tokens,)`;
        None: it asks for all."""
        has_mask = self.manifest.splits[split].mask_hash is not None
        return self._map(f"{split}.mask", "uint8") if has_mask else None

    def _map(self, name: str, dtype: str) -> "np.ndarray":
        import numpy as np

        files = token_files(self.manifest.dtype, self.manifest.splits)
        _check_size(self.folder / name, files[name].size)
        array = np.memmap(self.folder / name, dtype=dtype, mode="r")
        # Every view of the array keeps it, and with it the mark.
        array.in_use = self.in_use  # type: ignore[attr-defined]
        return array


def dataset_folder(config: DatasetConfig) -> Path:
    """`<root>/<dataset_name>/<dataset_config>`."""
    return Path(config.root).expanduser() / config.dataset_name / config.dataset_config


def read_prepared(config: DatasetConfig) -> PreparedDataset | None:
    """The prepared data set of `config`; see `read_folder`."""
    return read_folder(dataset_folder(config))


def open_prepared(config: DatasetConfig) -> PreparedDataset | None:
    """`read_prepared`, marked as in use as long as the result or an array of it lives."""
    folder = dataset_folder(config)
    # Read after the mark was set: what is whole now stays.
    mark = mark_used(folder) if folder.is_dir() else None
    prepared = read_folder(folder)
    if prepared is not None:
        prepared.in_use = mark
    return prepared


def read_folder(folder: Path) -> PreparedDataset | None:
    """The prepared data set in `folder`; None: there is none yet. Reads dataset.json and the sizes
    of the token files, in about a millisecond; DataError: they are damaged, or do not agree."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for name, file in token_files(manifest.dtype, manifest.splits).items():
        _check_size(folder / name, file.size)
    return PreparedDataset(folder, manifest)


def localize(config: DatasetConfig, store: StoreConfig) -> DatasetConfig:
    """`config` with `root` set to the local root that `store` gives, where training reads.
    ConfigError: the permanent copy would be the local folder itself."""
    if store.tokenized_cache_dir is not None:
        config = config.replace(root=store.tokenized_cache_dir)
    if store.permanent_root is not None:
        path = store.permanent_root.removeprefix("file://")
        there, here = (Path(root).expanduser().resolve() for root in (path, config.root))
        if not is_url(path) and there == here:
            raise ConfigError(
                f"store.permanent_root and the local root of token files are the same folder, "
                f"{path}; set store.tokenized_cache_dir to another one, or "
                "store.permanent_root=null"
            )
    return config


def read_manifest(folder: Path) -> Manifest | None:
    """dataset.json of `folder`; None: there is none. DataError: it cannot be read."""
    path = folder / MANIFEST_NAME
    advice = f"delete {folder} and prepare the data again"
    try:
        manifest = read_json(path, DataError, Manifest)
    except FileNotFoundError:
        return None
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: damaged ({reason}); {advice}") from None
    if not manifest.splits.keys() <= set(SPLITS):
        raise DataError(f"{path}: its splits are {', '.join(manifest.splits)}; {advice}")
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.format_version}, this toolkit reads "
            f"{FORMAT_VERSION}; {advice}"
        )
    return manifest


def nothing_held_out(prepared: PreparedDataset) -> str | None:
    """What to say where documents should have been held out and none was; None: all is well."""
    fraction = prepared.manifest.settings.get("validation_fraction")
    if prepared.has_split("val") or not isinstance(fraction, int | float) or fraction <= 0:
        return None
    number = prepared.num_documents("train")
    return (
        f"{prepared.folder}: none of its {count(number, 'document')} was held out "
        f"(dataset.validation_fraction {fraction:g}); raise it and prepare the data under another "
        "dataset.dataset_config, or set it to 0"
    )


def check_vocabulary(prepared: PreparedDataset, model_vocab_size: int) -> None:
    """Raise ConfigError when the model has fewer token ids than the data set's tokenizer."""
    require_ids(str(prepared.folder), prepared.vocab_size, model_vocab_size)


def require_ids(where: str, needed: int, model_vocab_size: int) -> None:
    """Raise ConfigError when the model has fewer than the `needed` ids of the data `where`."""
    if model_vocab_size < needed:
        raise ConfigError(
            f"model.vocab_size is {model_vocab_size}, but the tokenizer of {where} has {needed} "
            f"ids; set model.vocab_size to at least {needed}"
        )


def token_dtype(vocab_size: int) -> TokenDType:
    """The smallest type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def hash_blocks(path: Path, every: int = 1) -> dict[int, str]:
    """xxh3_64 of every `every`-th of the sampled blocks, by number; the last block always."""
    import xxhash

    size = path.stat().st_size
    hashes = {}
    with path.open("rb", buffering=0) as file:
        for number in [*range(0, NUM_BLOCKS - 1, every), NUM_BLOCKS - 1]:
            file.seek(max(0, size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
            hashes[number] = xxhash.xxh3_64_hexdigest(file.read(BLOCK_BYTES))
    return hashes


def _check_size(path: Path, expected: int) -> None:
    with guard(path, DataError):  # a loop of links, a folder that may not be entered
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes instead of {expected}"
        raise DataError(
            f"{path} {found} ({MANIFEST_NAME} beside it says so); restore it, or delete "
            f"{path.parent} and prepare the data again"
        )
