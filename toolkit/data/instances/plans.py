"""Plans: how documents become rows, computed once and kept beside the tokens.

    <dataset folder>/packing/<split>-<sequence_length>-<fingerprint>/
      plan.json    `PlanHeader`: what the plan is of, and counts
      *.npy        arrays of the kind of instances that made it

Where the data set's folder cannot be written, `$XDG_CACHE_HOME/toolkit/packing/` (`~/.cache`) takes
its place: what a plan is of stands in its name.

A plan gets its name in one rename when all of it is written, and a lock lets one process make it
while others wait. It can be deleted at any time: it is made again, and the same. Reading a header
needs no numpy.
"""

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

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

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

PLANS_FOLDER = "packing"
HEADER_NAME = "plan.json"

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
    cut_documents: int
    """Documents longer than `sequence_length`, which no row could hold whole."""
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
        return [folder / name for folder in plans_folders(self.prepared)]

    @property
    def folder(self) -> Path:
        """Where the plan is, or should be."""
        places = self.places
        return next((place for place in places if place.exists()), places[0])

    def header(self) -> PlanHeader | None:
        """What the plan holds; None: it is not made yet.

        Raises:
            DataError: it is there, but cannot be read or is not what its name says.
        """
        path = self.folder / HEADER_NAME
        try:
            header = read_json(path, DataError, PlanHeader)
        except FileNotFoundError:
            if self.folder.exists():
                raise self.damaged(f"{HEADER_NAME} is missing") from None
            return None
        except DataError as error:
            raise self.damaged(str(error).removeprefix(f"{self.folder}/")) from None
        if (header.kind, header.fingerprint) != (self.kind, self.fingerprint):
            raise self.damaged(f"{HEADER_NAME} is of other instances")
        return header

    def describe(
        self, documents: "Iterable[tuple[np.ndarray, np.ndarray]]", num_tokens: int, num_rows: int
    ) -> PlanHeader:
        """The header of rows that hold all tokens of `documents`, blocks of (starts, lengths)."""
        num_documents = cut_documents = 0
        for _, lengths in documents:
            num_documents += int((lengths > 0).sum())
            cut_documents += int((lengths > self.sequence_length).sum())
        return PlanHeader(
            kind=self.kind,
            split=self.split,
            sequence_length=self.sequence_length,
            fingerprint=self.fingerprint,
            num_instances=num_rows,
            num_documents=num_documents,
            num_tokens=num_tokens,
            efficiency=num_tokens / max(1, num_rows * self.sequence_length),
            cut_documents=cut_documents,
        )

    def array(self, name: str) -> "np.ndarray":
        """An array of the plan, a read-only memory map.

        Raises:
            DataError: it is missing or damaged.
        """
        import numpy as np

        try:
            return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise self.damaged(f"{name}.npy: {error}") from None

    def damaged(self, what: str) -> DataError:
        """The error that says so."""
        return DataError(
            f"{self.folder}: damaged ({what}); delete this folder, the plan is then made again"
        )


def ensure_plan(plan: Plan, make: Callable[[Path], PlanHeader]) -> PlanHeader:
    """The header of a plan, which is made now if there is none.

    Many processes may call this at once: one makes the plan, the others wait.

    Args:
        make: writes the plan's arrays into a folder and returns its header.

    Raises:
        DataError: the document index is damaged, or the plan cannot be written.
    """
    header = plan.header()
    if header is not None:
        return header
    *writable, last = plan.places
    for place in writable:
        try:
            return _ensure(plan, place, make)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise _unwritten(plan, place, error) from error
            logger.info("%s cannot be written; its plan goes to %s", place.parent, last.parent)
    try:
        return _ensure(plan, last, make)
    except OSError as error:
        raise _unwritten(plan, last, error) from error


def plans_folders(prepared: PreparedDataset) -> list[Path]:
    """Where what is kept beside the tokens of a data set may be: in its folder, or where that
    cannot be written, in a cache for all of them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [prepared.folder / PLANS_FOLDER, cache / "toolkit" / PLANS_FOLDER]


def keep_note(prepared: PreparedDataset, name: str, data: bytes) -> None:
    """Write a small file that `find_note` gives back; where that is not possible, nothing."""
    for folder in plans_folders(prepared):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, data)
            return


def find_note(prepared: PreparedDataset, name: str) -> bytes | None:
    """What `keep_note` wrote; None: there is none."""
    for folder in plans_folders(prepared):
        with contextlib.suppress(OSError, DataError):
            return read_bytes(folder / name, DataError)
    return None


def _ensure(plan: Plan, folder: Path, make: Callable[[Path], PlanHeader]) -> PlanHeader:
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = functools.partial(logger.info, "waiting for another process to make %s", folder)
    with locked(folder.with_name(f".{folder.name}.lock"), on_wait=waiting):
        header = plan.header()
        if header is None:
            started = time.monotonic()
            header = _make(plan, folder, make)
            _report(plan, header, time.monotonic() - started)
        return header


def _unwritten(plan: Plan, folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{error.filename or folder}: cannot write the plan of {plan.kind} instances: "
        f"{error.strerror or error}; make room or give write permission, or set "
        "XDG_CACHE_HOME to a folder that can be written, and run again"
    )


def create_array(folder: Path, name: str, shape: int, dtype: "np.dtype | type") -> "np.ndarray":
    """A new array of a plan to fill: a memory map whose place on disk is taken already (a full
    disk is an OSError here, where it would kill the process later).
    """
    import numpy as np

    path = folder / f"{name}.npy"
    if shape == 0:
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(shape,))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _make(plan: Plan, folder: Path, make: Callable[[Path], PlanHeader]) -> PlanHeader:
    # The lock is held: what is unfinished was left by a process that was killed.
    for leftover in folder.parent.glob(f".{folder.name}.*{TEMPORARY_SUFFIX}"):
        remove_tree(leftover)
    with new_folder(folder) as unfinished:
        header = make(unfinished)
        write_json_atomic(unfinished / HEADER_NAME, header)
    return header


def _report(plan: Plan, header: PlanHeader, seconds: float) -> None:
    what = [
        f"{count(header.num_documents, 'document')} in {count(header.num_instances, 'row')}",
        f"{header.efficiency:.2%} of positions filled",
        f"{count(header.cut_documents, 'document')} longer than {plan.sequence_length} cut",
    ]
    if header.dropped_tokens:
        what.append(
            f"{count(header.dropped_tokens, 'token')} dropped "
            f"({count(header.dropped_documents, 'whole document')}), shorter than the shortest row"
        )
    logger.info(
        "%s of %s as %s instances of %d tokens: %s; planned in %.1f s",
        plan.split,
        plan.prepared.folder,
        plan.kind,
        plan.sequence_length,
        ", ".join(what),
        seconds,
    )


INSTANCES_VERSION = 1
"""Changes when the same settings would give other rows."""


def instances_fingerprint(
    prepared: PreparedDataset, split: Split, kind: str, **settings: int | bool
) -> str:
    """16 hex digits that differ where any row does.

    Args:
        settings: whatever decides, beside the tokens, what a row of this kind holds.
    """
    import xxhash

    info = prepared.manifest.splits[split]
    # Token files made before indexes were hashed are told apart by the number of documents.
    index = info.index_hash or info.num_documents
    tokens = prepared.fingerprint(split)
    identity = (INSTANCES_VERSION, tokens, index, kind, sorted(settings.items()))
    return xxhash.xxh3_64_hexdigest(repr(identity).encode())


def packed_plan(prepared: PreparedDataset, split: Split, sequence_length: int) -> Plan:
    """The plan of packed instances, made or not."""
    fingerprint = instances_fingerprint(prepared, split, "packed", sequence_length=sequence_length)
    return Plan(prepared, split, "packed", sequence_length, fingerprint)


def padded_plan(prepared: PreparedDataset, split: Split, sequence_length: int) -> Plan:
    """The plan of padded instances, made or not."""
    fingerprint = instances_fingerprint(prepared, split, "padded", sequence_length=sequence_length)
    return Plan(prepared, split, "padded", sequence_length, fingerprint)


def variable_plan(
    prepared: PreparedDataset, split: Split, sequence_length: int, *, min_length: int
) -> Plan:
    """The plan of variable-length instances, made or not.

    Raises:
        ConfigError: see `VariableDataset`.
    """
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
    fingerprint = instances_fingerprint(
        prepared, split, "variable", sequence_length=sequence_length, min_length=min_length
    )
    return Plan(prepared, split, "variable", sequence_length, fingerprint)
