"""A look into token files: what they hold, and whether they are whole.

A prepared data set is checked against its dataset.json, a bare file against what the caller says of
it. Every file is read once, in blocks; all problems are found, not only the first.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.prepare.tools.bare_file import inspect_file
from toolkit.data.prepare.tools.inspection import (
    SAMPLE_TOKENS,
    Inspection,
    Sample,
    file_size,
    spread,
)
from toolkit.data.prepare.tools.scanning import scan_progress
from toolkit.data.prepare.tools.split_check import SplitCheck
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    Split,
    read_manifest,
)
from toolkit.errors import ConfigError, DataError


def inspect_path(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    num_samples: int = 3,
    quick: bool = False,
    progress: bool = True,
) -> Inspection:
    """Look at a prepared folder, at one of its .bin files, or at a bare file of token ids.

    Args:
        dtype, vocab_size, eos_id: of a bare file (default: uint16, any id, no documents).
        num_samples: documents of each split that are decoded, spread over it.
        quick: sizes, index and a few blocks only.
        progress: a bar on a terminal.

    Raises:
        ConfigError: these do not go with the path.
        DataError: there is nothing at the path, or its dataset.json cannot be read.
    """
    path = Path(path).expanduser()
    if num_samples < 0:
        raise ConfigError(f"-n: must not be negative: {num_samples}")
    given = {"--dtype": dtype, "--vocab-size": vocab_size, "--eos-id": eos_id}
    folder = path if path.is_dir() else path.parent
    try:
        manifest = read_manifest(folder)
        if path.is_dir() and manifest is None:
            raise DataError(f"{path}: no {MANIFEST_NAME} there; give a prepared folder, or a file")
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if manifest is None or (not path.is_dir() and path.stem not in manifest.splits):
            return inspect_file(path, dtype, vocab_size, eos_id, num_samples, quick, progress)
        told = [name for name, value in given.items() if value is not None]
        if told:
            raise ConfigError(f"{', '.join(told)}: {folder / MANIFEST_NAME} tells that; leave out")
        chosen = list(manifest.splits) if path.is_dir() else [path.stem]
        return _inspect_folder(folder, manifest, chosen, num_samples, quick, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}"
        ) from None


def _inspect_folder(
    folder: Path,
    manifest: Manifest,
    splits: Sequence[str],
    num_samples: int,
    quick: bool,
    progress: bool,
) -> Inspection:
    found = Inspection(
        path=str(folder),
        dtype=manifest.dtype,
        vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id,
        append_eos=manifest.append_eos,
        bos_id=manifest.bos_id,
        prepend_bos=manifest.prepend_bos,
        tokenizer=manifest.tokenizer_fingerprint,
        splits=[],
        problems=[],
        is_quick=quick,
    )
    tokenizer = _tokenizer(folder, manifest, found.problems)
    size = sum(file_size(folder / f"{split}.bin") or 0 for split in splits)
    with scan_progress("checking", size, enabled=progress) as advance:
        for split in splits:
            check = SplitCheck(folder, cast(Split, split), manifest, found.problems)
            report = check.run(quick=quick, advance=advance)
            found.splits.append(report)
            if check.is_readable:
                report.samples = _samples(check.ids, check.starts, tokenizer, num_samples)
    return found


def _tokenizer(folder: Path, manifest: Manifest, problems: list[str]) -> Tokenizer | None:
    place = folder / TOKENIZER_FOLDER
    if not place.is_dir():
        return None
    try:
        tokenizer = load_tokenizer(place)
    except DataError as error:
        problems.append(str(error))
        return None
    pairs: list[tuple[str, Any, Any]] = [
        ("fingerprint", tokenizer.fingerprint, manifest.tokenizer_fingerprint),
        ("vocabulary size", tokenizer.vocab_size, manifest.vocab_size),
    ]
    # A source of token files may name the end of documents where the tokenizer does not.
    if tokenizer.eos_id is not None:
        pairs.append(("end-of-document id", tokenizer.eos_id, manifest.eos_id))
    for name, is_there, recorded in pairs:
        if is_there != recorded:
            problems.append(
                f"{place}: its {name} is {is_there}, {MANIFEST_NAME} says {recorded}; it is not "
                "the tokenizer that made the tokens"
            )
            break
    return tokenizer


def _samples(
    ids: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer | None, count: int
) -> list[Sample]:
    """The beginnings of documents spread over a split."""
    samples = []
    for number in spread(len(starts), count):
        start = int(starts[number])
        end = int(starts[number + 1]) if number + 1 < len(starts) else len(ids)
        part = ids[start : min(end, start + SAMPLE_TOKENS)].tolist()
        text = tokenizer.decode(part) if tokenizer is not None else None
        samples.append(Sample(document=number, num_tokens=end - start, ids=part, text=text))
    return samples
