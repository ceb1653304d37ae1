"""Token files written straight from lists of documents, and what rows should hold of them."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from toolkit.data.tokens.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NUM_BLOCKS,
    Manifest,
    PreparedDataset,
    Split,
    SplitInfo,
    hash_blocks,
)
from toolkit.storage.atomic import hash_file, write_json_atomic

EOS = 60_000


def write_documents(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    split: Split = "train",
    targets: Sequence[Sequence[int]] | None = None,
    eos_id: int | None = EOS,
) -> PreparedDataset:
    """A data set whose `split` has the tokens of `documents`, one after the other; another split
    that is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(document) for document in documents], dtype=np.uint64)
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    starts = np.cumsum(lengths, dtype=np.uint64) - lengths
    (folder / f"{split}.bin").write_bytes(tokens.tobytes())
    (folder / f"{split}.idx").write_bytes(starts.tobytes())
    if targets is not None:
        mask = np.array([flag for flags in targets for flag in flags], dtype=np.uint8)
        (folder / f"{split}.mask").write_bytes(mask.tobytes())
    blocks = hash_blocks(folder / f"{split}.bin")
    info = SplitInfo(
        num_tokens=len(tokens),
        num_documents=len(documents),
        text_bytes=len(tokens),
        content_hash=hash_file(folder / f"{split}.bin"),
        block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
        index_hash=xxhash.xxh3_128_hexdigest(starts.tobytes()),
        mask_hash=None if targets is None else hash_file(folder / f"{split}.mask"),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype="uint16",
        vocab_size=1 << 16,
        eos_id=eos_id,
        append_eos=False,
        tokenizer_fingerprint="none",
        source_fingerprint="none",
        replaced_bytes=0,
        skipped_documents=0,
        settings={},
        splits={**_splits(folder), split: info},
    )
    write_json_atomic(folder / MANIFEST_NAME, manifest)
    return PreparedDataset(folder, manifest)


def _splits(folder: Path) -> dict[str, SplitInfo]:
    path = folder / MANIFEST_NAME
    return msgspec.json.decode(path.read_bytes(), type=Manifest).splits if path.exists() else {}


def numbered_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths whose tokens are all different (below 60,000 of them)."""
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    return [
        list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)
    ]


def overwrite_index(prepared: PreparedDataset, starts: Sequence[int]) -> None:
    """Another index of the same size."""
    np.array(starts, dtype=np.uint64).tofile(prepared.folder / "train.idx")
