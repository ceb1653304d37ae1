"""A prepared corpus made of nothing: for benchmarks of what comes after preparation."""

from pathlib import Path

import numpy as np

from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer
from toolkit.data.tokens.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NUM_BLOCKS,
    Manifest,
    SplitInfo,
    hash_blocks,
)
from toolkit.storage.atomic import hash_file, write_json_atomic


def write_corpus(
    folder: Path,
    num_tokens: int,
    *,
    is_sparse: bool,
    hash_content: bool = True,
    mean_document: int = 0,
    has_mask: bool = False,
) -> None:
    """A training split of `num_tokens` uint16 ids below 256.

    Sparse: all zeros, the file takes no room on disk. Otherwise random. Without `hash_content` the
    manifest names an empty hash: reading 2 TB of zeros would take an hour. The documents have
    `mean_document` tokens on average (0: there is one), a few of them many more than most, as in
    real text. `has_mask`: the loss asks for every second eight tokens.
    """
    folder.mkdir(parents=True)
    tokens = folder / "train.bin"
    with tokens.open("wb") as file:
        if is_sparse:
            file.truncate(num_tokens * 2)
        else:
            file.write(np.random.default_rng(0).integers(0, 256, num_tokens, np.uint16).tobytes())
    starts = np.zeros(1, np.uint64)
    if mean_document:
        sizes = np.random.default_rng(1).lognormal(-0.5, 1.0, num_tokens // mean_document)
        starts = np.append(
            starts, np.cumsum(np.maximum(1, sizes * mean_document).astype(np.uint64))
        )
        starts = starts[starts < num_tokens]
    (folder / "train.idx").write_bytes(starts.tobytes())
    if has_mask:
        (folder / "train.mask").write_bytes((np.arange(num_tokens) // 8 % 2).astype("u1").tobytes())
    tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer")
    blocks = hash_blocks(tokens)
    info = SplitInfo(
        num_tokens=num_tokens,
        num_documents=len(starts),
        text_bytes=num_tokens,
        content_hash=hash_file(tokens) if hash_content else "",
        block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
        mask_hash=hash_file(folder / "train.mask") if has_mask else None,
        num_targets=num_tokens // 2 if has_mask else None,
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        append_eos=True,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source_fingerprint="synthetic",
        replaced_bytes=0,
        skipped_documents=0,
        settings={},
        splits={"train": info},
    )
    write_json_atomic(folder / MANIFEST_NAME, manifest)
