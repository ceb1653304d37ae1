"""Folders on other machines: `s3://`, `gs://`, anything fsspec knows; errors a user can act on.

Credentials and endpoints come from where each store's own library looks: the environment
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, FSSPEC_S3_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...),
its files in the home folder, fsspec's configuration.

Each library retries a failed request by itself; on top of that every operation here is tried again
after errors that pass. Files move in chunks: memory does not grow with their size.
"""

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

from toolkit.errors import ConfigError, StorageError, UnfitServerError
from toolkit.storage.atomic import fsync_file, hash_file, write_atomic
from toolkit.storage.dialects import (
    STREAMS,
    is_lost_upload,
    knows_no_condition,
    md5_of,
    protocols_of,
    upload_options,
    version_of,
)
from toolkit.storage.transient import is_transient, message_of, reason_of
from toolkit.storage.urls import EXTRAS, problem_of_place, problem_of_protocol
from toolkit.threads import ThreadPool

log = logging.getLogger(__name__)

CHUNK = 4 << 20
"""Bytes of one ranged read."""
Result = TypeVar("Result")


class ContentError(StorageError):
    """A stored file is not what was stored: cut or changed."""


_ENDPOINTS = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class Retries(NamedTuple):
    """How often an operation is tried, and how long it pauses in between."""

    attempts: int = 5
    first_pause: float = 0.5
    """Seconds; doubled each time, and a random share of it is waited (so that ranks that failed
    together do not come back together)."""
    longest_pause: float = 30.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after attempt 0, 1, ..."""
        longest = min(self.longest_pause, self.first_pause * 2**attempt)
        return longest * random.uniform(0.5, 1.0)


def is_url(path: object) -> bool:
    """Whether `path` names a place by a protocol ("s3://..."), not a local path."""
    protocol, separator, _ = str(path).partition("://")
    return bool(separator) and protocol.replace("+", "").replace("-", "").isalnum()


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of `url` and the path in it; nothing is contacted.

    Raises:
        ConfigError: no such protocol, its library is not installed, or a relative file://.
    """
    from fsspec.core import url_to_fs

    if (problem := problem_of_place(url)) is not None:
        raise ConfigError(problem)
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("file", "local"):
        options["auto_mkdir"] = True
    if EXTRAS.get(protocol) == "s3":
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
        if endpoint:
            options["endpoint_url"] = endpoint
    try:
        filesystem, path = url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = f"pip install 'toolkit[{extra}]'" if extra else f"{reason_of(error)}"
        raise ConfigError(f"{url}: {protocol}:// needs a library: {advice}") from None
    except (ValueError, OSError) as error:  # some ask their server at once
        problem = problem_of_protocol(url) or reason_of(error)
        raise ConfigError(f"{url}: cannot be opened: {problem}") from None
    return filesystem, path.rstrip("/")


class RemoteFolder:
    """A folder of a store. Names are relative to it, with slashes; nothing is cached.

    Every method raises StorageError (one line) when the store refuses or stays out of reach;
    FileNotFoundError where that is an answer.
    """

    def __init__(self, url: str, *, retries: Retries | None = None) -> None:
        self.url = url.rstrip("/")
        self._filesystem, self._root = open_filesystem(self.url)
        self._is_local = "file" in protocols_of(self._filesystem)
        self._retries = retries or Retries()

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{name}", retries=self._retries)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rpartition("/")[2]

    def names(self, *, folders: bool = False) -> list[str]:
        """Names of all, or of the `folders`, directly in it; none where it does not exist."""
        entries = self._listing(lambda: self._filesystem.ls(self._root, detail=True))
        chosen = (e for e in entries if not folders or e["type"] == "directory")
        return sorted(PurePosixPath(entry["name"]).name for entry in chosen)

    def folders(self) -> list[str]:
        """Names of the folders directly in it; none where it does not exist."""
        return self.names(folders=True)

    def sizes(self) -> dict[str, int]:
        """Every file below it and its bytes; empty where it does not exist."""
        return {name: int(info["size"]) for name, info in self._files().items()}

    def versions(self) -> dict[str, tuple[int, str]]:
        """`version` of every file below it."""
        return {n: (int(info["size"]), version_of(info)) for n, info in self._files().items()}

    def hashes(self) -> dict[str, str]:
        """MD5 (hex digits) of the files below it that the store itself has hashed: those written by
        one request, on S3 and GCS."""
        found = {name: md5_of(info) for name, info in self._files().items()}
        return {name: md5 for name, md5 in found.items() if md5 is not None}

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with contextlib.suppress(FileNotFoundError):
            return self.size(name) >= 0
        return False

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self._ask("asking for", name, lambda path: self._info(path)["size"]))

    def version(self, name: str) -> tuple[int, str]:
        """Bytes of a file, and what the store says to tell its content from another (ETag,
        generation, time); empty where it says nothing. Raises FileNotFoundError."""

        def ask(path: str) -> tuple[int, str]:
            info = self._info(path)
            if info.get("size") is None:
                raise self._unfit(name, "tells no size")
            return int(info["size"]), version_of(info)

        return self._ask("asking for", name, ask)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Content of a file, or bytes `start` to `end` of it. Raises FileNotFoundError."""

        def get(path: str) -> bytes:
            data = self._filesystem.cat_file(path, start=start, end=end)
            if start is not None and end is not None and len(data) != end - start:
                if len(data) > end - start:
                    raise self._unfit(name, "sends no ranges of files")
                raise ConnectionError(f"got {len(data)} of {end - start} bytes")
            return data

        return self._ask("reading", name, get)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` on, a few chunks at a time."""

        def get(offset: int) -> None:
            end = min(offset + CHUNK, len(buffer))
            buffer[offset:end] = self.read(name, start + offset, start + end)

        self._in_parallel(get, range(0, len(buffer), CHUNK))

    def write(self, name: str, data: bytes) -> None:
        """A small file; what had that name is replaced."""

        def put(path: str) -> None:
            if self._is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, data)
            else:
                self._filesystem.pipe_file(path, data)

        with self._no_place_for(name):
            self._ask("writing", name, put)

    def create(self, name: str, data: bytes) -> bool:
        """`write` under a name that is free; False: it is taken.

        One request on stores that can (S3, GCS), where of two at the same moment one gets it. On
        others both may be told True, and the later content stays.
        """

        def put(path: str) -> bool:
            try:
                if self._is_local:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                if not knows_no_condition(error):
                    raise
                if self.exists(name):
                    return False
                self._filesystem.pipe_file(path, data)
            return True

        with self._no_place_for(name):
            return self._ask("writing", name, put)

    def modified(self, name: str) -> float | None:
        """When a file was last written, in seconds of the store's own clock; None where the store
        does not tell. Raises FileNotFoundError."""

        def ask(path: str) -> float | None:
            try:
                self._filesystem.invalidate_cache()
                return float(self._filesystem.modified(path).timestamp())
            except (NotImplementedError, KeyError, AttributeError):
                return None

        return self._ask("asking for", name, ask)

    def upload(self, local: Path, name: str) -> None:
        """Copy the file `local` here, in parts; its size is checked afterwards."""
        size = local.stat().st_size

        def put(path: str) -> None:
            options = upload_options(self._filesystem, size)
            self._filesystem.put_file(str(local), path, **options)
            if self._is_local:
                fsync_file(path)
            arrived = int(self._info(path)["size"])
            if arrived != size:
                raise ConnectionError(f"{arrived} of {size} bytes arrived")

        with self._no_place_for(name):
            self._ask("uploading", name, put)

    def download(self, name: str, local: Path, *, size: int, xxh3: str | None) -> None:
        """Copy a file to `local` and check it against `size` (bytes) and its hash; fsynced.

        Args:
            xxh3: 16 hex digits of xxh3_64 or 32 of xxh3_128; None: only the size is checked.

        Raises:
            ContentError: it is missing, or not what was expected.
        """
        where = f"{self.url}/{name}"
        try:
            self._download(name, local, size)
        except FileNotFoundError:
            raise ContentError(f"{where} is missing") from None
        if xxh3 is not None and hash_file(local, bits=128 if len(xxh3) == 32 else 64) != xxh3:
            raise ContentError(f"{where} has changed since it was saved")

    def hash(self, name: str, size: int, *, bits: Literal[64, 128] = 64) -> str:
        """xxh3_64 (or xxh3_128) of the first `size` bytes, without keeping them."""
        import xxhash

        digest = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
        buffer = memoryview(bytearray(min(size, STREAMS * CHUNK)))
        for start in range(0, size, len(buffer) or 1):
            part = buffer[: size - start]
            self.read_into(name, start, part)
            digest.update(part)
        return digest.hexdigest()

    def delete(self, names: Iterable[str]) -> None:
        """Remove these files, in this order; one that is gone already is no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._ask("deleting", name, self._filesystem.rm_file)

    def _download(self, name: str, local: Path, size: int) -> None:
        there = self.size(name)
        if there != size:
            raise ContentError(f"{self.url}/{name} has {there} bytes, expected {size}")
        with local.open("wb") as file:
            file.truncate(size)

            def get(offset: int) -> None:
                data = self.read(name, offset, min(offset + CHUNK, size))
                os.pwrite(file.fileno(), data, offset)

            self._in_parallel(get, range(0, size, CHUNK))
            os.fsync(file.fileno())

    def remove(self, *, first: str) -> None:
        """Remove the folder and all in it: the file `first`, then the rest."""

        def remove_tree(path: str) -> None:
            self._filesystem.invalidate_cache()
            self._filesystem.rm(path, recursive=True)

        self.delete([first])
        with contextlib.suppress(FileNotFoundError):
            self._ask("deleting", "", remove_tree)

    def move_to(self, target: "RemoteFolder", *, first: str) -> None:
        """Give the folder another name in its store: all files are copied, then `remove`d here."""
        for name in self.sizes():
            place = f"{target._root}/{name}"

            def copy(path: str, place: str = place) -> None:
                if self._is_local:
                    self._filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._filesystem.cp_file(path, place)

            self._ask("copying", name, copy)
        self.remove(first=first)

    @contextlib.contextmanager
    def _no_place_for(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.url}/{name}: cannot be written, its bucket or folder does not exist"
            ) from error

    def _unfit(self, name: str, problem: str) -> UnfitServerError:
        advice = "download the file first, or serve it by nginx or `rclone serve http`"
        return UnfitServerError(f"{self.url}/{name}: the server {problem}; {advice}")

    def _info(self, path: str) -> dict[str, Any]:
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return info

    def _files(self) -> dict[str, dict[str, Any]]:
        found = self._listing(lambda: self._filesystem.find(self._root, detail=True).values())
        prefix = len(self._filesystem._strip_protocol(self._root)) + 1
        return {entry["name"][prefix:]: entry for entry in found}

    def _listing(self, action: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
        def fresh(_: str) -> list[dict[str, Any]]:
            self._filesystem.invalidate_cache()
            return list(action())

        try:
            return self._ask("listing", "", fresh)
        except FileNotFoundError:
            return []

    def _in_parallel(self, action: Callable[[int], None], items: range) -> None:
        # Others may not be safe in threads.
        threads = STREAMS if self._filesystem.async_impl else 1
        with ThreadPool(max(1, min(threads, len(items)))) as pool:
            list(pool.map(action, items))

    def _ask(self, doing: str, name: str, action: Callable[[str], Result]) -> Result:
        """`action(path)`, tried again after errors that pass."""
        path = f"{self._root}/{name}" if name else self._root
        where = f"{self.url}/{name}" if name else self.url
        for attempt in range(self._retries.attempts):
            try:
                return action(path)
            except FileNotFoundError as error:
                # fsspec says so too of web servers that do not answer. (A name for an error that is
                # raised would keep this frame, and what its callers hold, until a collection.)
                if not (is_transient(error.__cause__ or error) or is_lost_upload(error)):
                    raise
                failure: BaseException = error.__cause__ or error
            except UnfitServerError:
                raise
            except Exception as error:
                if not is_transient(error):
                    raise StorageError(message_of(doing, where, error)) from error
                failure = error
            if attempt + 1 < self._retries.attempts:
                pause = self._retries.pause(attempt)
                log.info("%s %s: %s; again in %.1f s", doing, where, reason_of(failure), pause)
                time.sleep(pause)
        raise StorageError(
            f"{doing} {where} failed {self._retries.attempts} times, last: {reason_of(failure)}; "
            "check the network and the store, then try again"
        ) from failure
