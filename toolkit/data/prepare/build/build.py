"""From a source to a folder of token files: `build_dataset`.

What happens to one document:

1. The source is cut into shards by size (`text/sources.py`): some files, or a part of a large one.
2. A process takes the shard and reads the document out of it (`text/readers.py`). Text that is not
   UTF-8, a missing column or a broken line ends here, with the file and the place. So do documents
   that a filter leaves out; they are counted.
3. It is encoded together with its neighbours, about a megabyte at a time (`encoding.py`).
4. A hash of its identity (relative file name, and place in the file) decides between train and val.
5. Its ids, between the tokens that start and end documents, are appended to its shard's part of
   that split, its start to the part's index, and where the loss skips some tokens, a mask
   (`parts.py`). The part is complete when its .json with hashes is there.
6. When all parts are complete, documents that were there before are found, where asked for
   (`duplicates.py`). The others are joined in the order of shards into train.bin and val.bin
   (`join.py`), dataset.json is written beside them, everything is synced, and the folder gets its
   name in one rename (`prepared.py`).

A preparation that was killed continues with the parts that are complete; after a file was repaired,
with the parts of the other files. Memory is bounded by the batch of step 3 and the longest single
line or row, times the number of processes. The result does not depend on how many there are.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from toolkit.data.config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    DatasetConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.prepare.build.build_checks import check_choices, check_targets, no_training_text
from toolkit.data.prepare.build.duplicates import Duplicates
from toolkit.data.prepare.build.join import join_parts, joined_bytes
from toolkit.data.prepare.build.parts import (
    Part,
    TokenRules,
    is_complete,
    read_part,
    remove_left_over_files,
)
from toolkit.data.prepare.build.pool import encode_shards, num_cores
from toolkit.data.prepare.build.progress import Progress
from toolkit.data.prepare.build.sample import sample_texts
from toolkit.data.prepare.build.settings import settings_of
from toolkit.data.prepare.build.worker import Job, WorkerSetup, make_encoder
from toolkit.data.prepare.text.reading import Reading
from toolkit.data.prepare.text.shards import Plan, Shard
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.choice import build_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.tokens.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    token_dtype,
)
from toolkit.errors import DataError
from toolkit.storage.atomic import fsync_folder, fsync_tree, remove_tree, write_json_atomic

PARTS_VERSION = 4
"""Changes when the same settings would give other parts."""
MAX_VOCAB_SIZE = 1 << 32
"""Ids are stored in four bytes at most."""


class Vocabulary(NamedTuple):
    """What is known about the ids of a data set."""

    size: int
    eos_id: int | None
    bos_id: int | None
    fingerprint: str


def build_dataset(
    config: DatasetConfig,
    folder: Path,
    work_dir: str | None,
    report: Progress,
    *,
    cache_dir: str | None = None,
    make_room: Callable[[int], None] | None = None,
) -> PreparedDataset:
    """Build `folder`; nobody else may be doing so.

    Args:
        work_dir: folder for unfinished parts; default: beside `folder`.
        cache_dir: folder for raw texts of a hub data set; default: the libraries' own.
        make_room: called with the bytes of the data set as soon as they are known, before parts
            are joined; its DataError ends the building, and the parts stay.

    Raises:
        DataError: the input, the tokenizer or what lies at `folder` cannot be used.
    """
    assert config.source is not None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder}: exists, but is no prepared data set (it has no {MANIFEST_NAME}); give "
            "another dataset.dataset_name or dataset.dataset_config"
        )
    check_choices(config)
    plan = plan_source(
        config.source,
        config.validation_fraction,
        rows=config.instructions is not None,
        cache_dir=cache_dir,
    )
    for line in plan.notes():
        report.note(line)
    building, place = _workplaces(folder, work_dir)
    parts_folder = place / _settings_key(config, plan)
    parts_folder.mkdir(parents=True, exist_ok=True)

    tokenizer, checked = _tokenizer(config, plan, parts_folder / TOKENIZER_FOLDER, report)
    vocabulary = _vocabulary(config, tokenizer)
    setup = WorkerSetup(
        reading=_reading(config, vocabulary, plan),
        instructions=config.instructions,
        rules=TokenRules(
            dtype=token_dtype(vocabulary.size),
            vocab_size=vocabulary.size,
            bos_id=vocabulary.bos_id if config.prepend_bos else None,
            eos_id=vocabulary.eos_id if config.append_eos else None,
            always_mask=config.instructions is not None,
        ),
        tokenizer_folder=str(parts_folder / TOKENIZER_FOLDER) if tokenizer is not None else None,
        parts_folder=str(parts_folder),
        validation_fraction=config.validation_fraction,
    )
    if config.instructions is not None:
        make_encoder(setup, tokenizer)  # a template that cannot be used ends here, in one line
    jobs = [Job(index, shard, _shard_key(shard, plan)) for index, shard in enumerate(plan.shards)]
    remove_left_over_files(parts_folder)
    missing = [job for job in jobs if not is_complete(parts_folder, job.index, job.key)]
    report.start(str(folder), jobs, missing)
    for job in encode_shards(
        missing, setup, tokenizer, num_processes=config.num_processes or num_cores()
    ):
        report.advance(job)
    plan.check_unchanged()

    output = building / "output"
    if output.exists():
        remove_tree(output)
    output.mkdir(parents=True)
    manifest = _join(
        config,
        plan,
        setup,
        tokenizer,
        vocabulary,
        checked=checked,
        output=output,
        workplace=building / "duplicates",
        make_room=make_room,
    )
    if tokenizer is not None:
        tokenizer.save(output / TOKENIZER_FOLDER)
    write_json_atomic(output / MANIFEST_NAME, manifest)
    fsync_tree(output)
    os.rename(output, folder)
    fsync_folder(folder.parent)
    remove_unfinished(folder, work_dir)
    prepared = PreparedDataset(folder, manifest)
    report.finish(prepared)
    return prepared


def remove_unfinished(folder: Path, work_dir: str | None) -> None:
    """Remove what building `folder` leaves beside it (and in `work_dir`) until it is complete.

    The lock of `folder` must be held. What is left of a removal that was cut short keeps its name:
    the next one, or the next building, goes on with it.
    """
    building, place = _workplaces(folder, work_dir)
    # Parts are known by their hashes, the tokenizer only by its mark.
    for mark in place.glob(f"*/{TOKENIZER_FOLDER}.done"):
        mark.unlink()
    for path in (place, building):
        if path.exists():
            shutil.rmtree(path)


def _workplaces(folder: Path, work_dir: str | None) -> tuple[Path, Path]:
    """Where `folder` is put together, and where its parts are."""
    building = folder.with_name(f".{folder.name}.building")
    if work_dir is None:
        return building, building / "parts"
    place_id = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
    return building, Path(work_dir).expanduser() / f"prepare-{place_id}"


def _tokenizer(
    config: DatasetConfig, plan: Plan, folder: Path, report: Progress
) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of `config`, stored in `folder`, from where workers load it; and the release of
    `transformers` that gives the same ids, where it was asked."""
    choice = config.tokenizer
    if choice is None:
        return None, None
    done = folder.with_name(f"{folder.name}.done")
    if done.exists():
        return load_tokenizer(folder), done.read_text() or None
    if isinstance(choice, BPETokenizerConfig):
        report.note(f"training a BPE tokenizer of {choice.vocab_size} ids")
    tokenizer = build_tokenizer(choice, lambda size: sample_texts(config, plan, size))
    if config.instructions is not None:
        from toolkit.data.prepare.build.instructions import with_instructions_template

        tokenizer = with_instructions_template(tokenizer, config.instructions)
    tokenizer = tokenizer.with_bos_policy(config.prepend_bos)
    tokenizer.save(folder)
    checked = None
    if not isinstance(choice, ByteTokenizerConfig | BPETokenizerConfig):
        # Those two are made here, of parts that `transformers` takes as they are.
        from toolkit.data.prepare.tokenizers.auto import settle

        checked = settle(folder, where=f"dataset.tokenizer.path: {choice.path}")
        tokenizer = load_tokenizer(folder)
    done.write_text(checked or "")
    return tokenizer, checked


def _vocabulary(config: DatasetConfig, tokenizer: Tokenizer | None) -> Vocabulary:
    source = config.source
    size, eos_id, bos_id, fingerprint = 0, None, None, ""
    if tokenizer is not None:
        size, eos_id, bos_id = tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id
        fingerprint = tokenizer.fingerprint
    if isinstance(source, TokenFilesSourceConfig):
        size = _as_told("vocab_size", source.vocab_size, size or None) or 0
        eos_id = _as_told("eos_id", source.eos_id, eos_id)
        fingerprint = fingerprint or f"unknown-{size}-{eos_id}"
        if eos_id is None:
            raise DataError(
                "dataset.source.eos_id: must be given, dataset.tokenizer names no end-of-document "
                "token"
            )
        if size > MAX_VOCAB_SIZE:
            raise DataError(
                f"dataset.source.vocab_size: must be at most {MAX_VOCAB_SIZE}, not {size}"
            )
        if not 0 <= eos_id < size:
            raise DataError(
                f"dataset.source.eos_id: {eos_id} is outside the vocabulary of {size} ids"
            )
    if config.append_eos and eos_id is None:
        raise DataError(
            "dataset.tokenizer: it names no end-of-document token; set dataset.tokenizer.eos_token "
            "to one of its tokens, or dataset.append_eos=false"
        )
    if config.prepend_bos and bos_id is None:
        raise DataError(
            "dataset.tokenizer: it names no start-of-document token; set "
            "dataset.tokenizer.bos_token to one of its tokens, or dataset.prepend_bos=false"
        )
    return Vocabulary(size, eos_id, bos_id, fingerprint)


def _as_told(name: str, told: int | None, of_tokenizer: int | None) -> int | None:
    """What the config tells of token files, which may not contradict their tokenizer."""
    if told is None or of_tokenizer is None or told == of_tokenizer:
        return of_tokenizer if told is None else told
    raise DataError(
        f"dataset.source.{name}: is {told}, but dataset.tokenizer has {of_tokenizer}; leave it "
        "out, or, where the tokens were made by another tokenizer, set dataset.tokenizer to that "
        "or to null"
    )


def _reading(config: DatasetConfig, vocabulary: Vocabulary, plan: Plan) -> Reading:
    assert config.source is not None
    return Reading(
        source=config.source,
        cache_dir=plan.cache_dir,
        rows=config.instructions is not None,
        filters=config.filters,
        with_digests=config.deduplicate,
        vocab_size=vocabulary.size,
        eos_id=vocabulary.eos_id,
    )


def _join(
    config: DatasetConfig,
    plan: Plan,
    setup: WorkerSetup,
    tokenizer: Tokenizer | None,
    vocabulary: Vocabulary,
    *,
    checked: str | None,
    output: Path,
    workplace: Path,
    make_room: Callable[[int], None] | None,
) -> Manifest:
    """Join all parts; count and hash what is written."""
    parts_folder = Path(setup.parts_folder)
    found = [read_part(parts_folder, index) for index in range(len(plan.shards))]
    parts = [part for part in found if part is not None]
    assert len(parts) == len(found), "a part vanished while parts were joined"
    left_out = _sum_counts(parts)
    duplicates = None
    if config.deduplicate:
        if workplace.exists():
            remove_tree(workplace)
        workplace.mkdir()
        duplicates = Duplicates(parts_folder, len(parts), workplace)
        left_out["duplicate"] = duplicates.count
    dtype = token_dtype(vocabulary.size)
    if make_room is not None:
        saved = (parts_folder / TOKENIZER_FOLDER).rglob("*")
        num_bytes = joined_bytes(parts_folder, parts, dtype=dtype, duplicates=duplicates)
        make_room(num_bytes + sum(path.stat().st_size for path in saved if path.is_file()))
    splits = join_parts(parts_folder, parts, output, dtype=dtype, duplicates=duplicates)
    skipped = sum(part.skipped_documents for part in parts) + plan.num_empty
    check_targets(setup, plan, tokenizer, splits, left_out)
    if "train" not in splits:
        raise DataError(no_training_text(splits, left_out, skipped))
    return Manifest(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=vocabulary.size,
        eos_id=vocabulary.eos_id,
        append_eos=config.append_eos,
        bos_id=vocabulary.bos_id,
        prepend_bos=config.prepend_bos,
        tokenizer_fingerprint=vocabulary.fingerprint,
        tokenizer_checked=checked,
        source_fingerprint=plan.fingerprint,
        replaced_bytes=sum(part.replaced_bytes for part in parts),
        skipped_documents=skipped,
        cut_documents=sum(part.cut_documents for part in parts),
        filtered_documents=left_out,
        left_out_files=dict(plan.left_out_files),
        settings=settings_of(config),
        splits=splits,
    )


def _sum_counts(parts: list[Part]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for reason, count in part.filtered_documents.items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items()))


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
