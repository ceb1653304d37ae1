"""Several prepared data sets, one after the other, as one."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from toolkit.data.prepare.build.split_files import SplitFiles
from toolkit.data.prepare.tools.rewrite import (
    copy_documents,
    has_mask,
    new_folder,
    open_source,
    token_bytes,
    write_dataset,
)
from toolkit.data.prepare.tools.scanning import scan_progress
from toolkit.data.tokens.prepared import (
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    PreparedDataset,
    SplitInfo,
    TokenDType,
)
from toolkit.errors import ConfigError, DataError

_POLICIES = {
    "tokenizer_fingerprint": "tokenizer",
    "vocab_size": "vocabulary size",
    "eos_id": "end-of-document id",
    "append_eos": "append_eos",
    "bos_id": "start-of-document id",
    "prepend_bos": "prepend_bos",
}


def merge_datasets(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> PreparedDataset:
    """All documents of `folders`, in this order, as the data set `output`.

    The type of the ids is the widest of theirs. Where one has a mask of targets, so has the
    result: all tokens of the others are targets.

    Raises:
        ConfigError: fewer than two data sets, or one twice.
        DataError: they differ in tokenizer or in how documents start and end; one is damaged;
            `output` exists, or there is no room for it.
    """
    if len(folders) < 2:
        raise ConfigError("merge needs at least two data sets; give two or more folders")
    places = [Path(folder).expanduser().resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{folder}: given twice; to see data more often, use a mix")
    sources = [open_source(folder) for folder in folders]
    _check_same(sources)
    dtypes = {source.manifest.dtype for source in sources}
    dtype: TokenDType = "uint32" if "uint32" in dtypes else "uint16"
    output = Path(output).expanduser()
    tokens = sum(source.num_tokens(split) for source in sources for split in SPLITS)
    documents = sum(source.num_documents(split) for source in sources for split in SPLITS)
    itemsize = np.dtype(dtype).itemsize + any(has_mask(source) for source in sources)
    with (
        new_folder(output, tokens * itemsize + documents * 8) as folder,
        scan_progress("merging", sum(map(token_bytes, sources)), enabled=progress) as advance,
    ):
        splits: dict[str, SplitInfo] = {}
        for split in SPLITS:
            taking_part = [source for source in sources if source.has_split(split)]
            is_masked = any(s.manifest.splits[split].mask_hash is not None for s in taking_part)
            files = SplitFiles(folder, split, dtype, has_mask=is_masked)
            try:
                for source in taking_part:
                    copy_documents(source, split, [files], _all_to_first, advance)
                    files.text_bytes += source.manifest.splits[split].text_bytes
            finally:
                files.close()
            info = files.finish()
            if info is not None:
                splits[split] = info
        first = sources[0].manifest
        text = xxhash.xxh3_64("\n".join(s.manifest.source_fingerprint for s in sources).encode())
        reasons = {reason for s in sources for reason in s.manifest.filtered_documents}
        endings = {ending for s in sources for ending in s.manifest.left_out_files}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=dtype,
            vocab_size=first.vocab_size,
            eos_id=first.eos_id,
            append_eos=first.append_eos,
            bos_id=first.bos_id,
            prepend_bos=first.prepend_bos,
            tokenizer_fingerprint=first.tokenizer_fingerprint,
            tokenizer_checked=first.tokenizer_checked,
            source_fingerprint=text.hexdigest(),
            replaced_bytes=sum(source.manifest.replaced_bytes for source in sources),
            skipped_documents=sum(source.manifest.skipped_documents for source in sources),
            cut_documents=sum(source.manifest.cut_documents for source in sources),
            filtered_documents={
                reason: sum(s.manifest.filtered_documents.get(reason, 0) for s in sources)
                for reason in sorted(reasons)
            },
            left_out_files={
                ending: sum(s.manifest.left_out_files.get(ending, 0) for s in sources)
                for ending in sorted(endings)
            },
            settings={"merged": [source.folder.name for source in sources]},
            splits=splits,
        )
        tokenizers = [s.tokenizer_folder for s in sources if s.tokenizer_folder is not None]
        write_dataset(folder, manifest, tokenizers[0] if tokenizers else None)
    return PreparedDataset(output, manifest)


def _check_same(sources: Sequence[PreparedDataset]) -> None:
    first = sources[0]
    for other in sources[1:]:
        differences = [
            f"{name} ({getattr(first.manifest, field)} and {getattr(other.manifest, field)})"
            for field, name in _POLICIES.items()
            if getattr(first.manifest, field) != getattr(other.manifest, field)
        ]
        if differences:
            raise DataError(
                f"{first.folder} and {other.folder} differ in {', '.join(differences)}; "
                "prepare one of them again with the settings of the other"
            )


def _all_to_first(first: int, end: int) -> np.ndarray:
    return np.zeros(end - first, dtype=np.int64)
