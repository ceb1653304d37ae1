"""Files that someone could hand to a user: whole ones, changed in one place by a seeded hand."""

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from toolkit.checkpoint.folder import METADATA_FILE, FileEntry, encode_metadata, read_metadata
from toolkit.errors import CheckpointError
from toolkit.storage.atomic import hash_file

Change = Callable[[random.Random, Path], None]

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**62, 2**63, 10**12, 10**30, -(10**12), 0.5, 1e308, -0.0, "",
    "x", "\ud800", "\0", "../../../etc/passwd", "/dev/zero", "x" * 100_000, [], {}, [[]], [None],
    {"": None}, ["a", 1], "${HOME}", "{{ 'a' * 10**10 }}", "{% for i in range(9999) %}{% endfor %}",
)  # fmt: skip
DEEP = "[" * 3000 + "]" * 3000


def change_json(rng: random.Random, path: Path) -> None:
    """One value somewhere in the file is another one, gone, deep, or there twice."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return change_bytes(rng, path)
    places = list(_places(data))
    if not places:
        return change_bytes(rng, path)
    holder, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1:
        holder[key] = "@@DEEP@@"
    elif kind == 2:
        holder[key] = [holder[key]] * rng.choice((0, 2, 500))
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(("__class__", "auto_map", "", "type", "a.b"))] = rng.choice(VALUES)
    elif kind == 4:
        holder[key] = "@@NAN@@"
    else:
        holder[key] = rng.choice(VALUES)
    text = json.dumps(data)
    text = text.replace('"@@DEEP@@"', DEEP).replace('"@@NAN@@"', rng.choice(("NaN", "1e999", "-0")))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return None


def change_bytes(rng: random.Random, path: Path) -> None:
    """Some bytes are others, more, or gone."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place:place] = rng.randbytes(rng.choice((1, 8, 500)))
        elif kind == 2:
            del data[place : place + rng.choice((1, 4, 64))]
        elif kind == 3:
            data[place : place + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        elif place < len(data):
            data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def replace_file(rng: random.Random, path: Path) -> None:
    """It is no file at all, or one of another kind."""
    text = path.read_bytes() if path.stat().st_size < 1 << 20 else b"{}"
    path.unlink()
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.write_bytes(text.decode("utf-8", "replace").encode("utf-16"))
    elif kind == 6:
        path.write_text(DEEP)
    elif kind == 7:
        with path.open("wb") as file:
            file.truncate(1 << 33 if path.suffix in (".json", ".safetensors") else 1 << 24)
    else:
        path.write_text(rng.choice(("null", "[]", "1", '"a"', "{}", "[{}]")))


def change_any(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.15:
        replace_file(rng, path)
    elif path.suffix == ".json" and rng.random() < 0.8:
        change_json(rng, path)
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        change_safetensors(rng, path)
    else:
        change_bytes(rng, path)


def change_safetensors(rng: random.Random, path: Path) -> None:
    """Its header says something else."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = path.with_name("header.json")
    header.write_bytes(data[8 : 8 + size])
    change_json(rng, header)
    text = header.read_bytes()
    header.unlink()
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, size * 2))
    path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])


def mend_manifest(checkpoint: Path) -> None:
    """The manifest says of the files what they are now."""
    try:
        metadata = read_metadata(checkpoint)
    except (CheckpointError, OSError):
        return
    files = {}
    for name in metadata.files:
        path = checkpoint / name
        if path.is_file() and path.stat().st_size < 1 << 24:
            files[name] = FileEntry(path.stat().st_size, hash_file(path))
    changed = msgspec.structs.replace(metadata, files=files)
    (checkpoint / METADATA_FILE).write_bytes(encode_metadata(changed))


def resign(checkpoint: Path) -> None:
    """The manifest's own hash is that of its content again."""
    path = checkpoint / METADATA_FILE
    if not path.is_file() or path.stat().st_size > 1 << 24:
        return
    try:
        raw = path.read_bytes()
        found = json.loads(raw)["xxh3"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    import xxhash

    if isinstance(found, str) and len(found) == 16:
        blank = raw.replace(found.encode(), b"0" * 16, 1)
        path.write_bytes(blank.replace(b"0" * 16, xxhash.xxh3_64_hexdigest(blank).encode(), 1))


def write_data(rng: random.Random, folder: Path) -> tuple[Path, str, bool]:
    """A data file or folder of any kind, changed: `(path, type of the source, has rows)`."""
    folder.mkdir(parents=True)
    chats = rng.random() < 0.4
    rows = _chats(rng) if chats else [{"text": f"line {n}: some words é " * 5} for n in range(60)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    kind = rng.choice(("jsonl", "jsonl", "gz", "zst", "parquet", "arrow", "stream", "disk", "txt"))
    path = folder / f"a.{'jsonl.' if kind in ('gz', 'zst') else ''}{kind}"
    if kind in ("jsonl", "txt"):
        path.write_bytes(lines)
        if kind == "jsonl" and rng.random() < 0.7:
            _change_line(rng, path)
            return path, "files", chats
    elif kind == "gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "zst":
        path.write_bytes(zstandard.compress(lines))
    elif kind == "parquet":
        codec = rng.choice(("none", "zstd", "snappy", "gzip"))
        pq.write_table(pa.Table.from_pylist(rows), path, compression=codec)
    elif kind == "disk":
        import datasets

        datasets.disable_progress_bars()
        path = folder / "set"
        datasets.Dataset.from_list(rows).save_to_disk(path)
        change_any(rng, rng.choice([p for p in path.iterdir() if p.is_file()]))
        return path, "disk", chats
    else:
        path = folder / "a.arrow"
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, None, "zstd", "lz4")))
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as out:
            out.write_table(table, max_chunksize=20)
    if rng.random() < 0.1:
        replace_file(rng, path)
    else:
        change_bytes(rng, path)
    return path, "files", chats


def copy_changed(
    rng: random.Random, source: Path, target: Path, names: Callable[[Path], bool]
) -> Path:
    """A copy of a folder of which one file is changed; that file."""
    shutil.copytree(source, target)
    files = sorted(p for p in target.rglob("*") if p.is_file() and names(p.relative_to(target)))
    path = rng.choice(files)
    change_any(rng, path)
    return path


def _places(data: Any) -> Any:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items) if isinstance(data, dict | list) else ():
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _chats(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "y"}]}
        for n in range(40)
    ]


def _change_line(rng: random.Random, path: Path) -> None:
    lines = path.read_bytes().splitlines()
    number = rng.randrange(len(lines))
    line = path.with_name("line.json")
    line.write_bytes(lines[number])
    change_json(rng, line)
    lines[number] = line.read_bytes()
    line.unlink()
    path.write_bytes(b"\n".join(lines))
