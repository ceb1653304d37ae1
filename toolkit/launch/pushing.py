"""What a mirror sends: the run folder as it is, in an order that leaves the URL resumable.

    metadata/ metrics/ tb/ logs/ ...    whole files, whenever they have changed
    *.jsonl *.log                       grow: in pieces of 1 MiB, NAME, NAME.part1, NAME.part2, ...
    checkpoints/step{N}/                by the upload of checkpoint/remote.py, `.metadata.json` last

Of a file that grows, only the last piece is sent again: a look costs at most 1 MiB of each beyond
what is new, however long the run. The pieces one after the other are the file. What was cut back,
as at a resume, is noticed by its hash. The committed checkpoints are listed before metrics are
sent, and sent after them.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.checkpoint.folder import METADATA_FILE, is_committed, saved_steps, step_folder
from toolkit.checkpoint.remote import set_aside_at, upload_checkpoint
from toolkit.checkpoint.retention import Retention, prune_checkpoints
from toolkit.errors import CheckpointError, RunError, StorageError, TrainingError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import TEMPORARY_SUFFIX
from toolkit.storage.remote import RemoteFolder
from toolkit.storage.transient import is_transient

log = logging.getLogger(__name__)

PIECE = 1 << 20
"""Bytes of a piece of a file that grows."""
_LARGE = 64 << 20
"""Bytes of a file that is not read into memory; those that may grow are smaller."""
GROWING = (".jsonl", ".log")
BULKY = (RUN_FILES.merged, RUN_FILES.exports, RUN_FILES.profiles)
"""Folders sent as checkpoints are: metrics do not wait for them."""
_NOT_SENT = (RUN_FILES.checkpoints, RUN_FILES.downloads)
_FIRST = (RUN_FILES.metrics, RUN_FILES.metadata)
"""Folders sent before others, of which there may be many files, and that checkpoints need."""
_SET_ASIDE = (RUN_FILES.metrics, RUN_FILES.tensorboard, RUN_FILES.trackers)
"""Folders that a run which starts anew gives other names."""
_LOCAL = (RUN_FILES.lock, RUN_FILES.lock_info, RUN_FILES.copy_of, "stop")
"""The last is a request to the process that runs here (`trainer.stop_file`)."""
_PART = ".part"


class Pusher:
    """Brings the run in `folder` to `remote`; `rule` says which checkpoints stay there."""

    def __init__(
        self,
        folder: Path,
        remote: RemoteFolder,
        rule: Retention,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._remote, self._rule = folder, remote, rule
        self._check = check
        """Raises where this process may write there no more."""
        self._sent: dict[str, tuple[int, int]] = {}
        """Name -> size and time of last change, of what is there."""
        self._pieces: dict[str, list[tuple[int, str]]] = {}
        """Of a file that grows: size and MD5 of each piece that is there."""
        self._unchecked: set[str] = set()
        """Of these, what was there at the beginning and was not compared yet."""
        self._hashes: dict[str, str] = {}
        """MD5 of other files that were there at the beginning, where the store tells."""
        self._done: set[int] = set()
        """Steps whose checkpoints are there."""

    def begin(self) -> None:
        """Take away what the folder does not have any more: records of an attempt that was set
        aside, and steps that are trained again."""
        names = {name for name, _ in self._files(bulky=False)}
        there = self._remote.sizes()
        for name in list(there):
            if name.partition("/")[0] in _SET_ASIDE and whole_name(name)[0] not in names:
                self._remote.delete([name])
                del there[name]
        root = self._remote / RUN_FILES.checkpoints
        newest = max(saved_steps(self._folder / RUN_FILES.checkpoints), default=0)
        for step in saved_steps(root.url):
            if step > newest:
                log.warning("%s", set_aside_at(root.url, step))
        self._hashes = self._remote.hashes()
        pieces = sorted(
            (*whole_name(name), size)
            for name, size in there.items()
            if name.partition("/")[0] not in _NOT_SENT and whole_name(name)[0].endswith(GROWING)
        )
        for whole, piece, size in pieces:
            name = piece_name(whole, piece)
            md5 = self._hashes.pop(name, None) or _md5(self._remote.read(name))
            self._pieces.setdefault(whole, []).append((size, md5))
            self._unchecked.add(whole)

    def committed(self) -> list[int]:
        """Steps of checkpoints that are not there yet, the newest first; what metrics lead to them
        is in the folder."""
        root = self._folder / RUN_FILES.checkpoints
        return [step for step in reversed(saved_steps(root)) if step not in self._done]

    def push_files(self, *, bulky: bool = False) -> Exception | None:
        """Send what has changed of the folder, without checkpoints; `bulky`: of `BULKY` alone.

        Returns why one of them was not sent, of which checkpoints are none the worse. Raises
        StorageError or OSError where the store is out of reach, or a file that they need was not.
        """
        files = dict(self._files(bulky=bulky))
        failed: Exception | None = None
        for name, path in sorted(files.items(), key=lambda item: _place(item[0])):
            if bulky != _is_bulky(name):
                continue
            self._check()
            try:
                self._push_file(name, path)
            except FileNotFoundError:
                pass  # renamed or removed just now
            except (StorageError, OSError) as error:
                is_down = error.__cause__ is not None and is_transient(error.__cause__)
                if is_down or _place(name) < len(_FIRST):
                    raise
                failed = failed or error
        gone = [n for n in list(self._sent) if n not in files and bulky == _is_bulky(n)]
        for name in gone:
            if name in self._pieces:
                self._cut(name, 0)
                del self._pieces[name]
            else:
                self._remote.delete([name])
            del self._sent[name]
        return failed

    def push_checkpoints(self, steps: list[int]) -> None:
        """Send these, and then remove what the rule does not keep."""
        root, target = self._folder / RUN_FILES.checkpoints, self._remote / RUN_FILES.checkpoints
        for step in steps:
            self._check()
            try:
                upload_checkpoint(step_folder(root, step), target.url)
            except TrainingError as error:
                is_damaged = isinstance(error.__cause__, CheckpointError)
                if is_committed(step_folder(root, step)) and not is_damaged:
                    raise
                if is_damaged:
                    log.warning("%s", error)
                self._done.add(step)  # or removed meanwhile, as newer ones came
                continue
            self._done.add(step)
            prune_checkpoints(target.url, self._rule, newest=max(self._done))

    def _files(self, *, bulky: bool) -> Iterator[tuple[str, Path]]:
        """Names and paths of what is sent, a `.metadata.json` after the files it speaks of. Raises
        RunError where the folder is no run (any more): its files are not gone one by one."""
        if not (self._folder / RUN_FILES.status).is_file():
            raise RunError(f"{self._folder}: was removed or moved; its copy stays as it is")
        for parent, folders, files in os.walk(self._folder):
            above = Path(parent).relative_to(self._folder)
            folders[:] = sorted(
                name
                for name in folders
                if (above / name).as_posix() not in (*_NOT_SENT, *(() if bulky else BULKY))
                and not (name.endswith(TEMPORARY_SUFFIX) or name.startswith("."))
            )
            for file in sorted(files, key=lambda name: (name == METADATA_FILE, name)):
                name = (above / file).as_posix()
                is_hidden = file.startswith(".") and file != METADATA_FILE
                if not is_hidden and name not in _LOCAL and not file.endswith(".lock"):
                    yield name, Path(parent, file)

    def _push_file(self, name: str, path: Path) -> None:
        about = path.stat()
        state = about.st_size, about.st_mtime_ns
        if self._sent.get(name) == state or not path.is_file():
            return
        if name.endswith(GROWING):
            self._push_pieces(name, path, about.st_size)
        elif _is_bulky(name) or about.st_size > _LARGE:
            self._remote.upload(path, name)
        else:
            with path.open("rb") as file:  # which may have grown by now, as events do
                self._write(name, file.read(about.st_size))
        self._sent[name] = state

    def _push_pieces(self, name: str, path: Path, size: int) -> None:
        sent = self._pieces.setdefault(name, [])
        number = max(1, -(-size // PIECE))
        self._cut(name, number)
        with path.open("rb") as file:

            def read(piece: int) -> bytes:
                file.seek(piece * PIECE)
                return file.read(min(PIECE, size - piece * PIECE))

            first = max(0, len(sent) - 1)
            is_known = bool(sent) and name not in self._unchecked
            if not is_known or _md5(read(first)[: sent[first][0]]) != sent[first][1]:
                first = 0  # cut back, and grown again
            for piece in range(first, number):
                data = read(piece)
                about = len(data), _md5(data)
                if sent[piece : piece + 1] != [about]:
                    self._cut(name, piece + 1)
                    self._remote.write(piece_name(name, piece), data)
                    sent[piece : piece + 1] = [about]
        self._unchecked.discard(name)

    def _cut(self, name: str, number: int) -> None:
        """Leave the first `number` pieces. From the end, so that what is there is always the
        beginning of some state of the file."""
        sent = self._pieces[name]
        for piece in reversed(range(number, len(sent))):
            self._remote.delete([piece_name(name, piece)])
            del sent[piece]

    def _write(self, name: str, data: bytes) -> None:
        if self._hashes.pop(name, None) != _md5(data):
            self._remote.write(name, data)


def piece_name(name: str, piece: int) -> str:
    """What piece 0, 1, ... of a file that grows is called."""
    return f"{name}{_PART}{piece}" if piece else name


def whole_name(name: str) -> tuple[str, int]:
    """The file that a piece is of, and its number; any other name as it is."""
    whole, _, number = name.rpartition(_PART)
    if whole.endswith(GROWING) and number.isdecimal():
        return whole, int(number)
    return name, 0


def push_all(pusher: Pusher, *, say: Callable[[str], object] = lambda text: None) -> None:
    """Send everything that is not there, in order."""
    steps = pusher.committed()
    failed = pusher.push_files()
    if steps:
        say(f"checkpoints: {', '.join(f'step{step}' for step in steps)}")
    pusher.push_checkpoints(steps)
    failed = pusher.push_files(bulky=True) or failed
    if failed is not None:
        raise failed


def _place(name: str) -> int:
    """Where a file stands in the order."""
    top = name.partition("/")[0]
    return _FIRST.index(top) if top in _FIRST else len(_FIRST)


def _is_bulky(name: str) -> bool:
    return name.partition("/")[0] in BULKY


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
