"""Token files for a config: those that exist, or new ones made now.

What happens to one document:

1. The source is cut into shards by size (`text/sources.py`): some files, or a part of a large one.
2. A process takes the shard and reads the document out of it (`text/reading.py`). Text that is not
   UTF-8, a missing column or a broken line ends here, with the file and the place. So do documents
   that a filter leaves out; they are counted.
3. It is encoded together with its neighbours, about a megabyte at a time (`encoding.py`). Beside
   that a worker asks whether `transformers` gives the same ids (`vocabulary.py`).
4. A hash of its identity (relative file name, and place in the file) decides between train and val.
5. Its ids, between the tokens that start and end documents, are appended to its shard's part of
   that split, with its start and, where the loss skips some tokens, a mask (`parts.py`).
6. When all parts are complete, documents that were there before are found, where asked for. The
   others are joined in the order of shards into train.bin and val.bin (`join.py`), dataset.json is
   written beside them, everything is synced, and the folder gets its name in one rename.

A preparation that was killed continues with the parts that are complete; after a file was repaired,
with the parts of the other files. Memory is bounded by the batch of step 3 and the longest single
line or row, times the number of processes. The result does not depend on how many there are.
"""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from toolkit.data.config import BPETokenizerConfig, DatasetConfig, StoreConfig
from toolkit.data.prepare.build.audit import audit_rows
from toolkit.data.prepare.build.completions import NO_OTHER
from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.build.join import Duplicates, KeptParts, sum_counts
from toolkit.data.prepare.build.parts import (
    Job,
    Part,
    PartsSetup,
    complete_part,
    make_encoder,
    part_folder,
)
from toolkit.data.prepare.build.progress import encoding, printer, summary
from toolkit.data.prepare.build.settings import (
    check_settings,
    check_source,
    not_a_dataset,
    settings_of,
)
from toolkit.data.prepare.build.vocabulary import (
    checked_release,
    plan_of_text,
    stored_tokenizer,
    tokenizer_check,
    vocabulary_of,
)
from toolkit.data.prepare.build.workers import Errand, encode_shards
from toolkit.data.prepare.store.cache import build_lock, raw_text_cache
from toolkit.data.prepare.store.store import DatasetStore
from toolkit.data.prepare.text.reading import Counts, read_shard
from toolkit.data.prepare.text.sources import Plan, Shard
from toolkit.data.prepare.tokenizers.bulk import IdsDiffer
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.tokens.in_use import mark_used
from toolkit.data.tokens.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    SplitInfo,
    dataset_folder,
    localize,
    open_prepared,
)
from toolkit.errors import DataError
from toolkit.storage.atomic import new_folder, remove_tree, write_json_atomic
from toolkit.storage.locks import locked
from toolkit.threads import cores_here

PARTS_VERSION = 5
"""Changes when the same settings would give other parts."""


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
    folder, note = dataset_folder(config), printer(enabled=progress)
    places = DatasetStore(config, store, note)
    prepared = None
    try:
        prepared = open_prepared(config)
    except DataError:
        if store.permanent_root is None:  # else perhaps the permanent copy can replace it
            raise
    if prepared is not None:
        check_settings(prepared, config, check_text=check_text)
        if check_text:
            _remove_left_over(folder, work_dir)
    else:
        if store.permanent_root is None:
            _check_can_build(config)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another process to prepare {folder}"
            with locked(build_lock(folder), on_wait=lambda: note(waiting)):
                prepared = places.obtain(check_text=check_text)
                if prepared is None:
                    _check_can_build(config)
                    with raw_text_cache(config, store) as cache_dir:
                        prepared = _build(config, places, work_dir, cache_dir, progress=progress)
                    prepared.in_use = mark_used(folder)
                    check_text = True
        except OSError as error:
            raise DataError(
                f"{error.filename or folder}: cannot prepare data: {error.strerror or error}; "
                "finished parts are kept, run again to continue"
            ) from error
    if check_text:
        places.settle(prepared)
    return prepared


prepare_dataset = ensure_prepared


def write_dataset(folder: Path, manifest: Manifest, tokenizer_folder: Path | None) -> None:
    """Write dataset.json and the tokenizer beside token files that are written."""
    if tokenizer_folder is not None:
        shutil.copytree(tokenizer_folder, folder / TOKENIZER_FOLDER)
    write_json_atomic(folder / MANIFEST_NAME, manifest, sync=False)


def _check_can_build(config: DatasetConfig) -> None:
    if config.source is None:
        raise DataError(
            f"{dataset_folder(config)}: no prepared data ({MANIFEST_NAME}) there, and "
            "dataset.source is null; set dataset.source, or dataset.root (--data-root) to where "
            "the token files are"
        )


def _workplaces(folder: Path, work_dir: str | None) -> tuple[Path, Path]:
    """Where `folder` is put together, and where its parts are."""
    building = folder.with_name(f".{folder.name}.building")
    if work_dir is None:
        return building, building / "parts"
    place_id = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
    return building, Path(work_dir).expanduser() / f"prepare-{place_id}"


def _remove_left_over(folder: Path, work_dir: str | None) -> None:
    """Parts of a whole data set whose preparation was killed before it removed them."""
    if any(path.exists() for path in _workplaces(folder, work_dir)):
        suppress = contextlib.suppress(OSError)  # another time
        with suppress, locked(build_lock(folder), wait=False) as is_locked:
            if is_locked and (folder / MANIFEST_NAME).exists():
                _remove_unfinished(folder, work_dir)


def _remove_unfinished(folder: Path, work_dir: str | None) -> None:
    """Remove what building `folder` leaves until it is complete. The lock of `folder` must be held.
    A removal that was cut short is continued by the next one, or the next building."""
    building, place = _workplaces(folder, work_dir)
    # Parts are known by their hashes, the tokenizer only by its mark.
    for mark in place.glob(f"*/{TOKENIZER_FOLDER}.done"):
        mark.unlink()
    for path in (place, building):
        if path.exists():
            shutil.rmtree(path)


def _build(
    config: DatasetConfig,
    places: DatasetStore,
    work_dir: str | None,
    cache_dir: str | None,
    *,
    progress: bool,
) -> PreparedDataset:
    """Build the folder of `config`; nobody else may be doing so."""
    folder, note = dataset_folder(config), printer(enabled=progress)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise not_a_dataset(folder)
    check_source(config)
    plan = plan_of_text(config, cache_dir)
    for line in plan.listing.notes():
        note(line)
    building, place = _workplaces(folder, work_dir)
    parts_folder = place / _settings_key(config, plan)
    parts_folder.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = parts_folder / TOKENIZER_FOLDER
    tokenizer = stored_tokenizer(config, plan, tokenizer_folder, note)
    vocabulary = vocabulary_of(config, tokenizer)
    setup = PartsSetup(str(parts_folder), config, vocabulary, plan.cache_dir)
    audit = None
    if setup.has_mask:
        encoder = make_encoder(setup, tokenizer)
        assert isinstance(encoder, InstructionEncoder)
        audit = audit_rows(encoder, plan.shards, setup.reading, note)
        for line in audit.lines(of_units=config.unit is not None):
            note(line)
    jobs = [Job(index, shard, _shard_key(shard, plan)) for index, shard in enumerate(plan.shards)]
    for path in parts_folder.glob("*[0-9]*.*"):  # what killed processes were writing or removing
        shutil.rmtree(path, ignore_errors=True)
    parts = [complete_part(job, setup) for job in jobs]
    missing = [job for job, part in zip(jobs, parts, strict=True) if part is None]
    started = time.monotonic()
    num_processes = config.num_processes or cores_here()
    check = tokenizer_check(config, tokenizer_folder)

    def encode_missing(setup: PartsSetup, check: Errand | None) -> None:
        with encoding(str(folder), jobs, missing, note, enabled=progress) as advance:
            for job, part in encode_shards(
                missing, setup, tokenizer, num_processes=num_processes, errand=check
            ):
                parts[job.index] = part
                advance(job)

    try:
        encode_missing(setup, check)
    except IdsDiffer as error:
        note(str(error))
        for job in missing:
            remove_tree(part_folder(parts_folder, job.index))
        encode_missing(setup._replace(in_bulk=False), tokenizer_check(config, tokenizer_folder))
    plan.listing.check_unchanged()
    left_out_rows: dict[str, str] = {}
    for part in filter(None, parts):
        left_out_rows = {**part.left_out_rows, **left_out_rows}
    for reason, row in sorted(left_out_rows.items()):
        note(f"left out ({reason}): {row}")
    with new_folder(folder, unfinished=building / "output") as output:
        splits, counts = _join(
            [part for part in parts if part], places, plan, setup, tokenizer, output
        )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=setup.dtype,
            vocab_size=vocabulary.size,
            eos_id=vocabulary.eos_id,
            append_eos=config.append_eos,
            bos_id=vocabulary.bos_id,
            prepend_bos=config.prepend_bos,
            tokenizer_fingerprint=vocabulary.fingerprint,
            tokenizer_checked=checked_release(config, tokenizer_folder),
            source_fingerprint=plan.fingerprint,
            **counts,
            left_out_files=dict(plan.listing.left_out),
            audit=audit,
            unit=config.unit or msgspec.UNSET,
            settings=settings_of(config),
            splits=splits,
        )
        write_dataset(output, manifest, setup.tokenizer_folder)
    _remove_unfinished(folder, work_dir)
    prepared = PreparedDataset(folder, manifest)
    for line in summary(prepared, time.monotonic() - started):
        note(line)
    return prepared


def _join(
    parts: list[Part],
    places: DatasetStore,
    plan: Plan,
    setup: PartsSetup,
    tokenizer: Tokenizer | None,
    output: Path,
) -> tuple[dict[str, SplitInfo], dict[str, Any]]:
    """Join all parts; their splits, and what reading had to repair and leave out."""
    config, parts_folder = setup.config, Path(setup.folder)
    counts = sum_counts(parts)
    counts["skipped_documents"] += plan.listing.num_empty
    filtered = counts["filtered_documents"]
    duplicates = None
    if config.deduplicate:
        workplace = output.with_name("duplicates")
        remove_tree(workplace)
        workplace.mkdir()
        duplicates = Duplicates(parts_folder, len(parts), workplace)
        filtered["duplicate"] = duplicates.count
    saved = [path for path in (parts_folder / TOKENIZER_FOLDER).rglob("*") if path.is_file()]
    kept = KeptParts(parts_folder, parts, setup.dtype, duplicates, config.unit)
    places.make_room(kept.num_bytes() + sum(path.stat().st_size for path in saved))
    splits = kept.join(output, has_mask=setup.has_mask)
    if kept.num_alone:
        filtered[NO_OTHER] = kept.num_alone
    if setup.has_mask:
        # Data whose loss asks for nothing, or for every token, was misread.
        encoder = make_encoder(setup, tokenizer)
        assert isinstance(encoder, InstructionEncoder)
        num_targets = sum(info.num_targets or 0 for info in splits.values())
        has_context = any(part.has_context for part in parts)
        encoder.check(
            num_tokens=sum(i.num_tokens for i in splits.values()) if has_context else num_targets,
            num_targets=num_targets,
            filtered=filtered,
            first_piece=lambda: next(
                (p for shard in plan.shards for p in read_shard(shard, setup.reading, Counts())),
                None,
            ),
        )
    if "train" not in splits:
        why = [f"{n} by {reason}" for reason, n in filtered.items() if n]
        empty = counts["skipped_documents"]
        why += [f"{empty} empty"] if empty else []
        why += ["all others were held out"] if splits else []
        raise DataError(
            "dataset.source: gave no training text"
            + (f" (left out: {', '.join(why)})" if why else "")
            + "; check its paths, text field and filters, or set dataset.validation_fraction=0"
        )
    return splits, counts


def _settings_key(config: DatasetConfig, plan: Plan) -> str:
    """Identifies all that parts depend on but the text itself; a tokenizer that is trained depends
    on all text."""
    text = plan.fingerprint if isinstance(config.tokenizer, BPETokenizerConfig) else None
    identity = (FORMAT_VERSION, PARTS_VERSION, settings_of(config), text)
    return xxhash.xxh3_64_hexdigest(repr(identity).encode())


def _shard_key(shard: Shard, plan: Plan) -> str:
    """Identifies the text of a shard: local files by size and time of their last change, others by
    the whole source."""
    is_local = all(part.modified_ns for part in shard)
    source = "" if is_local else plan.fingerprint
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(shard) + source.encode())
