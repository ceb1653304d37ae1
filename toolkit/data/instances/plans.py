"""Plans: how documents become rows, computed once and kept beside the tokens.

    <dataset folder>/packing/<split>-<sequence_length>-<fingerprint>/
      plan.json    `PlanHeader`: what the plan is of, and counts
      *.npy        arrays of the kind of instances that made it

Where the data set's folder cannot be written, `$XDG_CACHE_HOME/toolkit/packing/` (`~/.cache`) takes
its place: what a plan is of stands in its name.

A plan gets its name in one rename when all of it is written, and a lock lets one process make it
while others wait. It can be deleted at any time: it is made again, and the same. Nothing here needs
numpy.
"""

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.errors import ConfigError, DataError
from toolkit.storage.atomic import (
    TEMPORARY_SUFFIX,
    new_folder,
    remove_tree,
    write_atomic,
    write_json_atomic,
)
from toolkit.storage.foreign import read_bytes, read_json
from toolkit.storage.locks import locked
from toolkit.wording import count

logger = logging.getLogger(__name__)

PLANS_FOLDER = "packing"
HEADER_NAME = "plan.json"
INSTANCES_VERSION = 1
"""Changes when the same settings would give other rows."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

PlanKind = Literal["packed", "padded", "variable"]


class Bucket(msgspec.Struct, frozen=True):
    """Instances of one length; they are numbered one bucket after the other."""

    length: int
    """Tokens of each row."""
    first: int
    """Number of its first instance."""
    num_instances: int


class PlanHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Content of plan.json."""

    kind: PlanKind
    split: str
    sequence_length: int
    fingerprint: str
    """Of the instances."""
    num_instances: int
    num_documents: int
    """Documents that are not empty."""
    num_tokens: int
    """Tokens in rows."""
    efficiency: float
    """Share of the rows' positions that hold tokens, not padding."""
    long_documents: int | None = None
    """Documents longer than `sequence_length`, which no row could hold whole; None: plans of older
    releases have the number under another name."""
    dropped_tokens: int = 0
    """Tokens in no row."""
    dropped_documents: int = 0
    """Documents with no token in any row; empty ones are not counted."""
    buckets: tuple[Bucket, ...] = ()
    """Lengths of rows, ascending; where all have one length, none."""


class Plan(NamedTuple):
    """Identifies the plan of one split, made or not."""

    prepared: PreparedDataset
    split: Split
    kind: PlanKind
    sequence_length: int
    fingerprint: str

    @property
    def places(self) -> list[Path]:
        """Folders where the plan may be, the first where it should be."""
        name = f"{self.split}-{self.sequence_length}-{self.fingerprint}"
        return [folder / name for folder in _plans_folders(self.prepared)]

    @property
    def folder(self) -> Path:
        """Where the plan is, or should be."""
        places = self.places
        return next((place for place in places if place.exists()), places[0])

    def header(self) -> PlanHeader | None:
        """What the plan holds; None: it is not made yet. DataError: it is damaged."""
        try:
            header = read_json(self.folder / HEADER_NAME, DataError, PlanHeader)
        except FileNotFoundError:
            if self.folder.exists():
                raise self.damaged(f"{HEADER_NAME} is missing") from None
            return None
        except DataError as error:
            raise self.damaged(str(error).removeprefix(f"{self.folder}/")) from None
        if (header.kind, header.fingerprint) != (self.kind, self.fingerprint):
            raise self.damaged(f"{HEADER_NAME} is of other instances")
        return header

    def damaged(self, what: str) -> DataError:
        return DataError(
            f"{self.folder}: damaged ({what}); delete this folder, the plan is then made again"
        )


def plan_of(
    prepared: PreparedDataset,
    split: Split,
    kind: PlanKind,
    sequence_length: int,
    *,
    min_length: int | None = None,
) -> Plan:
    """The plan of instances of one kind; `min_length` is the shortest row of variable ones.

    Raises:
        ConfigError: `sequence_length` of variable ones is no power of two, or below `min_length`.
    """
    settings = {"sequence_length": sequence_length}
    if min_length is not None:
        settings["min_length"] = min_length
        if sequence_length.bit_count() != 1:
            below = 1 << (sequence_length.bit_length() - 1)
            raise ConfigError(
                f"dataset.sequence_length {sequence_length} must be a power of two with "
                f"dataset.instances of type variable; the nearest are {below} and {2 * below}"
            )
        if min_length > sequence_length:
            raise ConfigError(
                f"dataset.instances.min_sequence_length {min_length} is more than "
                f"dataset.sequence_length {sequence_length}; make it smaller"
            )
    fingerprint = instances_fingerprint(prepared, split, kind, **settings)
    return Plan(prepared, split, kind, sequence_length, fingerprint)


def instances_fingerprint(
    prepared: PreparedDataset, split: Split, kind: str, **settings: int | bool
) -> str:
    """16 hex digits that differ where any row does; `settings` are whatever decides, beside the
    tokens, what a row of this kind holds."""
    import xxhash

    info = prepared.manifest.splits[split]
    # Token files made before indexes were hashed are told apart by the number of documents.
    index = info.index_hash or info.num_documents
    tokens = prepared.fingerprint(split)
    identity = (INSTANCES_VERSION, tokens, index, kind, sorted(settings.items()))
    return xxhash.xxh3_64_hexdigest(repr(identity).encode())


def ensure_plan(plan: Plan, make: Callable[[Path], PlanHeader]) -> PlanHeader:
    """The header of a plan, which is made now if there is none: `make` writes its arrays into a
    folder. Of many processes that call this at once, one makes the plan and the others wait.

    Raises:
        DataError: the document index is damaged, or the plan cannot be written.
    """
    header, places = plan.header(), plan.places
    if header is not None:
        return header
    for place in places:
        try:
            return _make_once(plan, place, make)
        except OSError as error:
            failed, where = error, error.filename or place
            if error.errno not in _READ_ONLY or place == places[-1]:
                break
            logger.info("%s cannot be written; its plan goes to %s", place.parent, places[1].parent)
    raise DataError(
        f"{where}: cannot write the plan of {plan.kind} instances: {failed.strerror or failed}; "
        "make room or give write permission, or set XDG_CACHE_HOME to a folder that can be "
        "written, and run again"
    ) from failed


def _make_once(plan: Plan, folder: Path, make: Callable[[Path], PlanHeader]) -> PlanHeader:
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = functools.partial(logger.info, "waiting for another process to make %s", folder)
    with locked(folder.with_name(f".{folder.name}.lock"), on_wait=waiting):
        header = plan.header()
        if header is not None:
            return header
        started = time.monotonic()
        # The lock is held: what is unfinished was left by a process that was killed.
        for leftover in folder.parent.glob(f".{folder.name}.*{TEMPORARY_SUFFIX}"):
            remove_tree(leftover)
        with new_folder(folder) as unfinished:
            header = make(unfinished)
            write_json_atomic(unfinished / HEADER_NAME, header)
    why = "shorter than the shortest row"
    if plan.prepared.unit is not None:
        why = "in units longer than a row"
    dropped = (
        f", {count(header.dropped_tokens, 'token')} dropped "
        f"({count(header.dropped_documents, 'whole document')}), {why}"
    )
    logger.info(
        f"{plan.split} of {plan.prepared.folder} as {plan.kind} instances of "
        f"{plan.sequence_length} tokens: {count(header.num_documents, 'document')} in "
        f"{count(header.num_instances, 'row')}, {header.efficiency:.2%} of positions filled, "
        f"{count(header.long_documents or 0, 'document')} longer than {plan.sequence_length} cut"
        f"{dropped if header.dropped_tokens else ''}; "
        f"planned in {time.monotonic() - started:.1f} s"
    )
    return header


def keep_note(prepared: PreparedDataset, name: str, data: bytes) -> None:
    """Write a small file that `find_note` gives back; where that is not possible, nothing."""
    for folder in _plans_folders(prepared):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, data)
            return


def find_note(prepared: PreparedDataset, name: str) -> bytes | None:
    """What `keep_note` wrote; None: there is none."""
    for folder in _plans_folders(prepared):
        with contextlib.suppress(OSError, DataError):
            return read_bytes(folder / name, DataError)
    return None


def _plans_folders(prepared: PreparedDataset) -> list[Path]:
    """In the data set's folder, or where that cannot be written, in a cache for all of them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [prepared.folder / PLANS_FOLDER, cache / "toolkit" / PLANS_FOLDER]
