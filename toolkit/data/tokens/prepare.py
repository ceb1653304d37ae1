"""From text to token files: `prepare_dataset`.

What happens to one document:

1. The source is cut into shards by size (`sources.py`): some files, or a part of a large one.
2. A process takes the shard and reads the document out of it (`readers.py`). Text that is not
   UTF-8, a missing field or a broken line ends here, with the file and the place.
3. It is encoded together with its neighbours, about a megabyte at a time, as ordinary text.
4. A hash of its identity (relative file name, and place in the file) decides between train and val.
5. Its ids, and one end-of-document id, are appended to its shard's part of that split; its start
   to the part's index (`worker.py`). The part is complete when its .json with hashes is there.
6. When all parts are complete they are joined in the order of shards into train.bin and val.bin,
   dataset.json is written beside them, everything is synced, and the folder gets its name in one
   rename (`prepared.py`).

A preparation that was killed continues with the parts that are complete. Memory is bounded by the
batch of step 3, times the number of processes. The result does not depend on how many there are.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock
import msgspec
import numpy as np
import xxhash

from toolkit.data.config import BPETokenizerConfig, DatasetConfig, StoreConfig
from toolkit.data.text.readers import Counts, read_shard
from toolkit.data.text.sources import Plan, plan_source
from toolkit.data.tokens.cache import build_lock
from toolkit.data.tokens.in_use import mark_used
from toolkit.data.tokens.pool import encode_shards, num_cores
from toolkit.data.tokens.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NUM_BLOCKS,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    SplitInfo,
    dataset_folder,
    hash_blocks,
    token_dtype,
)
from toolkit.data.tokens.progress import Progress
from toolkit.data.tokens.settings import check_settings, settings_of
from toolkit.data.tokens.store import localize, obtain, open_prepared, settle
from toolkit.data.tokens.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.tokens.tokenizer_choice import build_tokenizer
from toolkit.data.tokens.worker import SPLITS, Job, Part, WorkerSetup, is_validation, part_path
from toolkit.errors import DataError
from toolkit.storage.atomic import fsync_folder, fsync_tree, remove_tree, write_json_atomic

LOCK_POLL_SECONDS = 0.25
COPY_BYTES = 4 << 20
BPE_SAMPLE_SHARDS = 256


def ensure_prepared(
    config: DatasetConfig,
    *,
    store: StoreConfig | None = None,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> PreparedDataset:
    """The prepared data set of `config`; it is copied from the permanent store, or prepared, now if
    it does not exist yet.

    Many processes may call this at once: one prepares, the others wait. The folder is marked as in
    use as long as the result or an array of it lives.

    Args:
        store: where permanent and local copies are; default: `config.root` is all there is.
        work_dir: folder for unfinished parts; default: beside the data set.
        progress: show a progress bar on a terminal, a few lines elsewhere (standard error).
        check_text: compare data that exists with the source's files, which reads a little of each,
            and with the permanent copy; one process of a machine is enough.

    Raises:
        DataError: the text, the tokenizer or files that exist already cannot be used.
        StorageError: the permanent store is out of reach, and there is no local copy.
    """
    store = store or StoreConfig()
    config = localize(config, store)
    try:
        prepared = open_prepared(config)
    except DataError:
        if store.permanent_root is None:
            raise
        prepared = None  # perhaps the permanent copy can replace it
    if prepared is None:
        return prepare_dataset(
            config, store=store, work_dir=work_dir, progress=progress, check_text=check_text
        )
    check_settings(prepared, config, check_text=check_text)
    if check_text:
        settle(prepared, config, store, note=Progress(enabled=progress).note)
    return prepared


def prepare_dataset(
    config: DatasetConfig,
    *,
    store: StoreConfig | None = None,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> PreparedDataset:
    """Like `ensure_prepared`, without the quick look before the lock is taken."""
    store = store or StoreConfig()
    config = localize(config, store)
    folder = dataset_folder(config)
    if store.permanent_root is None:
        _check_can_build(config, folder)
    report = Progress(enabled=progress)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder, report):
            prepared = obtain(config, store, check_text=check_text, note=report.note)
            is_built = prepared is None
            if prepared is None:
                _check_can_build(config, folder)
                with report:
                    prepared = _build(config, folder, work_dir, report)
                prepared.in_use = mark_used(folder)
        if is_built or check_text:
            settle(prepared, config, store, note=report.note)
        return prepared
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot prepare data: {error.strerror or error}; finished "
            "parts are kept, run again to continue"
        ) from error


def _check_can_build(config: DatasetConfig, folder: Path) -> None:
    if config.source is None and not (folder / MANIFEST_NAME).exists():
        raise DataError(
            f"{folder}: no prepared data ({MANIFEST_NAME}) there, and dataset.source is null; "
            "set dataset.source, or dataset.root (--data-root) to where the token files are"
        )


def _build(
    config: DatasetConfig, folder: Path, work_dir: str | None, report: Progress
) -> PreparedDataset:
    assert config.source is not None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder}: exists, but is no prepared data set (it has no {MANIFEST_NAME}); give "
            "another dataset.dataset_name or dataset.dataset_config"
        )
    plan = plan_source(config.source, config.validation_fraction)
    building = folder.with_name(f".{folder.name}.building")
    place = building / "parts"
    if work_dir is not None:
        place_id = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
        place = Path(work_dir).expanduser() / f"prepare-{place_id}"
    parts_folder = place / _plan_fingerprint(config, plan)
    parts_folder.mkdir(parents=True, exist_ok=True)

    tokenizer = _tokenizer(config, plan, parts_folder / TOKENIZER_FOLDER, report)
    setup = WorkerSetup(
        source=config.source,
        tokenizer_folder=str(parts_folder / TOKENIZER_FOLDER),
        parts_folder=str(parts_folder),
        validation_fraction=config.validation_fraction,
        append_eos=config.append_eos,
    )
    jobs = [Job(index, shard) for index, shard in enumerate(plan.shards)]
    missing = [job for job in jobs if not _is_complete(parts_folder, job.index)]
    report.start(str(folder), jobs, missing)
    for job in encode_shards(
        missing, setup, tokenizer, num_processes=config.num_processes or num_cores()
    ):
        report.advance(job)

    output = building / "output"
    if output.exists():
        remove_tree(output)
    output.mkdir(parents=True)
    manifest = _join(config, plan, tokenizer, parts_folder, output)
    tokenizer.save(output / TOKENIZER_FOLDER)
    write_json_atomic(output / MANIFEST_NAME, manifest)
    fsync_tree(output)
    os.rename(output, folder)
    fsync_folder(folder.parent)
    remove_tree(building)
    remove_tree(place)
    prepared = PreparedDataset(folder, manifest)
    report.finish(prepared)
    return prepared


def _tokenizer(config: DatasetConfig, plan: Plan, folder: Path, report: Progress) -> Tokenizer:
    """The tokenizer of `config`, stored in `folder`, from where workers load it."""
    choice = config.tokenizer
    done = folder.with_name(f"{folder.name}.done")
    if done.exists():
        return load_tokenizer(folder)
    if isinstance(choice, BPETokenizerConfig):
        report.note(f"training a BPE tokenizer of {choice.vocab_size} ids")
    tokenizer = build_tokenizer(choice, lambda size: _sample(config, plan, size))
    if config.append_eos and tokenizer.eos_id is None:
        raise DataError(
            "dataset.tokenizer: it names no end-of-document token; set dataset.tokenizer.eos_token "
            "to one of its tokens, or dataset.append_eos=false"
        )
    tokenizer.save(folder)
    done.touch()
    return tokenizer


def _sample(config: DatasetConfig, plan: Plan, sample_bytes: int) -> Iterator[str]:
    """Training documents from shards spread over the whole source."""
    assert config.source is not None
    number = min(len(plan.shards), BPE_SAMPLE_SHARDS)
    left = sample_bytes
    for turn in range(number):
        quota = left // (number - turn)
        shard = plan.shards[turn * len(plan.shards) // number]
        for piece in read_shard(shard, config.source, Counts()):
            if piece.split == "val" or (
                piece.split is None and is_validation(piece.identity, config.validation_fraction)
            ):
                continue
            yield piece.text
            quota -= len(piece.text)
            left -= len(piece.text)
            if quota <= 0:
                break


def _is_complete(parts_folder: Path, index: int) -> bool:
    part = _read_part(parts_folder, index)
    if part is None:
        return False
    for split, stats in part.splits.items():
        expected = {"bin": stats.tokens_hash, "idx": stats.starts_hash}
        for ending, content_hash in expected.items():
            path = part_path(parts_folder, index, f"{split}.{ending}")
            if not path.exists():
                return False
            hasher = xxhash.xxh3_64()
            for data in _read_blocks(path):
                hasher.update(data)
            if hasher.hexdigest() != content_hash:
                return False
    return True


def _read_part(parts_folder: Path, index: int) -> Part | None:
    try:
        return msgspec.json.decode(part_path(parts_folder, index, "json").read_bytes(), type=Part)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _join(
    config: DatasetConfig, plan: Plan, tokenizer: Tokenizer, parts_folder: Path, output: Path
) -> Manifest:
    """Append all parts in the order of shards; count and hash what is written."""
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [_read_part(parts_folder, index) for index in range(len(plan.shards))]
    complete = [part for part in parts if part is not None]
    assert len(complete) == len(parts), "a part vanished while parts were joined"
    splits: dict[str, SplitInfo] = {}
    for split in SPLITS:
        num_tokens, hasher = 0, xxhash.xxh3_128()
        tokens_path, starts_path = output / f"{split}.bin", output / f"{split}.idx"
        with tokens_path.open("wb") as tokens_file, starts_path.open("wb") as starts_file:
            for index, part in enumerate(complete):
                for data in _read_blocks(part_path(parts_folder, index, f"{split}.bin")):
                    hasher.update(data)
                    tokens_file.write(data)
                for data in _read_blocks(part_path(parts_folder, index, f"{split}.idx")):
                    starts = np.frombuffer(data, dtype=np.uint64) + np.uint64(num_tokens)
                    starts_file.write(starts.tobytes())
                num_tokens += part.splits[split].num_tokens
        if num_tokens == 0:
            tokens_path.unlink()
            starts_path.unlink()
            continue
        assert tokens_path.stat().st_size == num_tokens * np.dtype(dtype).itemsize
        blocks = hash_blocks(tokens_path)
        splits[split] = SplitInfo(
            num_tokens=num_tokens,
            num_documents=sum(part.splits[split].num_documents for part in complete),
            text_bytes=sum(part.splits[split].text_bytes for part in complete),
            content_hash=hasher.hexdigest(),
            block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
        )
    if "train" not in splits:
        held_out = " (all documents were held out)" if splits else ""
        raise DataError(
            f"dataset.source: gave no training text{held_out}; check its paths and text field, "
            "or set dataset.validation_fraction=0"
        )
    return Manifest(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        append_eos=config.append_eos,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source_fingerprint=plan.fingerprint,
        replaced_bytes=sum(part.replaced_bytes for part in complete),
        skipped_documents=sum(part.skipped_documents for part in complete),
        settings=settings_of(config),
        splits=splits,
    )


def _plan_fingerprint(config: DatasetConfig, plan: Plan) -> str:
    identity = (FORMAT_VERSION, settings_of(config), plan.fingerprint, len(plan.shards))
    shards = msgspec.json.encode(plan.shards)
    return xxhash.xxh3_64_hexdigest(repr(identity).encode() + shards)


def _read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while data := file.read(COPY_BYTES):
            yield data


@contextlib.contextmanager
def _exclusive(folder: Path, report: Progress) -> Iterator[None]:
    """One process at a time builds this folder; the others say once that they wait, and poll."""
    lock = build_lock(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report.note(f"waiting for another process to prepare {folder}")
        lock.acquire(poll_interval=LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
