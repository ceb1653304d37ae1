import http.server
import threading
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.data.prepare.text.reading import read_all
from tests.s3 import BUCKET
from toolkit.data.config import DatasetConfig, TokenFilesSourceConfig
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.text import sources, token_files
from toolkit.data.prepare.text.files import SourceFile
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source, source_fingerprint
from toolkit.errors import DataError, StorageError
from toolkit.storage.remote import RemoteFolder

EOS = 50


def ids(num_tokens: int, seed: int = 0, *, dtype: str = "uint16") -> np.ndarray:
    """Ids below 50 with an end of document after about every twentieth."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, EOS, num_tokens)
    values[generator.random(num_tokens) < 0.05] = EOS
    return values.astype(dtype)


def documents_of(values: np.ndarray) -> list[list[int]]:
    """The same by a plain loop: documents with their ends, without empty ones."""
    found: list[list[int]] = [[]]
    for value in values.tolist():
        found[-1].append(value)
        if value == EOS:
            found.append([])
    return [document for document in found if document and document != [EOS]]


def joined(pieces: list[Piece]) -> list[list[int]]:
    documents: list[list[int]] = []
    for piece in pieces:
        assert piece.ids is not None
        if piece.starts:
            documents.append([])
        documents[-1] += piece.ids.tolist()
        last = piece
    assert last.ends
    return documents


def read(*paths: object, dtype: str = "uint16", **options) -> list[Piece]:
    source = TokenFilesSourceConfig(paths=[str(path) for path in paths], dtype=dtype)
    return read_all(source, vocab_size=EOS + 1, eos_id=EOS, **options)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 700)
    monkeypatch.setattr(sources, "MAX_SHARD_BYTES", 700)
    monkeypatch.setattr(token_files, "BLOCK_TOKENS", 37)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_documents_are_found_across_ranges_and_blocks(
    tmp_path: Path, small_parts: None, dtype: str
) -> None:
    for seed in range(4):
        values = ids(5000 + seed, seed, dtype=dtype)
        values.tofile(tmp_path / "a.bin")
        counts = Counts()
        pieces = read(tmp_path, dtype=dtype, counts=counts)
        assert joined(pieces) == documents_of(values)
        empty = int((values == EOS).sum()) + (values[-1] != EOS) - len(documents_of(values))
        assert counts.skipped_documents == empty
        starts = [p.identity for p in pieces if p.starts]
        assert len(set(starts)) == len(starts)


def test_one_document_longer_than_everything_is_read_once(
    tmp_path: Path, small_parts: None
) -> None:
    values = np.arange(4000, dtype=np.uint16) % EOS
    values.tofile(tmp_path / "a.npy")
    pieces = read(tmp_path / "a.npy", with_digests=True)
    assert joined(pieces) == [values.tolist()]
    assert pieces[0].identity == "a.npy:0"
    assert pieces[0].digest != 0
    # With an end token, in one piece or in several: the same document.
    np.append(values, EOS).astype(np.uint16).tofile(tmp_path / "b.npy")
    assert read(tmp_path / "b.npy", with_digests=True)[0].digest == pieces[0].digest


def test_ranges_inside_a_long_document_read_little(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    check = token_files._check_ids

    def counted(ids: np.ndarray, *arguments: object) -> None:
        nonlocal read
        read += len(ids)
        check(ids, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(token_files, "_check_ids", counted)
    values = np.arange(20_000, dtype=np.uint16) % EOS
    values.tofile(tmp_path / "a.bin")
    source = TokenFilesSourceConfig(paths=[str(tmp_path)], dtype="uint16")
    num_shards = len(plan_source(source, 0.0).shards)
    assert num_shards == 58
    for eos_id in (EOS, None):
        read = 0
        pieces = read_all(source, vocab_size=EOS + 1, eos_id=eos_id)
        assert joined(pieces) == [values.tolist()]
        assert read < 2 * len(values) + 2 * token_files.BLOCK_TOKENS * num_shards
    # A document that begins exactly where a range does is not lost.
    for place in (349, 350, 351, 699):
        values[place] = EOS
        values.tofile(tmp_path / "a.bin")
        assert joined(read_all(source, vocab_size=EOS + 1, eos_id=EOS)) == documents_of(values)
        values[place] = 0


def test_headers_of_numpy_are_skipped_and_checked(tmp_path: Path) -> None:
    values = ids(900)
    np.save(tmp_path / "real.npy", values.reshape(30, 30))
    values.tofile(tmp_path / "raw.npy")
    assert joined(read(tmp_path / "real.npy")) == documents_of(values)
    assert joined(read(tmp_path / "raw.npy")) == documents_of(values)
    with pytest.raises(DataError, match=r"real\.npy: its numpy header says u2 \(uint16\), not uin"):
        read(tmp_path / "real.npy", dtype="uint32")
    np.save(tmp_path / "columns.npy", np.asfortranarray(values.reshape(30, 30)))
    with pytest.raises(DataError, match=r"columns\.npy: its numbers are stored by columns"):
        read(tmp_path / "columns.npy")
    np.save(tmp_path / "big.npy", values.astype(">u2"))
    with pytest.raises(DataError, match=r"big\.npy: its numpy header says >u2"):
        read(tmp_path / "big.npy")
    data = (tmp_path / "real.npy").read_bytes()
    (tmp_path / "real.npy").write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"real\.npy: .*tells of 900 numbers, it holds 890"):
        read(tmp_path / "real.npy")
    (tmp_path / "real.npy").write_bytes(data[:9])
    with pytest.raises(DataError, match=r"real\.npy: its numpy header cannot be read"):
        read(tmp_path / "real.npy")


def test_ids_outside_the_vocabulary_are_named_by_place(tmp_path: Path, small_parts: None) -> None:
    values = ids(2000)
    values[1234] = 99
    values.tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: token 1234 has id 99, .* has 51 ids"):
        read(tmp_path)


def test_half_a_number_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(ids(100).tobytes() + b"\0")
    with pytest.raises(DataError, match=r"a\.bin: 201 bytes of tokens are no multiple of the 2"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file with tokens"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("protocol", ["memory", "s3"])
def test_remote_files_are_read_by_ranges(
    small_parts: None, request: pytest.FixtureRequest, protocol: str
) -> None:
    url = "memory://corpus"
    if protocol == "s3":
        request.getfixturevalue("s3")
        url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = RemoteFolder(url)
    first, second = ids(3000, 1), ids(2000, 2)
    store.write("part-0.npy", first.tobytes())
    store.write("deep/part-1.npy", second.tobytes())
    store.write("notes.txt", b"no tokens")
    try:
        expected = documents_of(second) + documents_of(first)
        assert joined(read(url)) == expected
        assert joined(read(f"{url}/part-*.npy")) == documents_of(first)
        assert joined(read(f"{url}/part-0.npy")) == documents_of(first)
        with pytest.raises(DataError, match=rf"{url}/other: no such file"):
            read(f"{url}/other")
        source = TokenFilesSourceConfig(paths=[url])
        fingerprint = plan_source(source, 0.0).fingerprint
        assert source_fingerprint(source) == fingerprint
        store.write("part-0.npy", second.tobytes() + first.tobytes()[4000:])
        assert plan_source(source, 0.0).fingerprint != fingerprint
    finally:
        store.remove(first="part-0.npy")


def test_local_fingerprint_is_that_of_the_plan(tmp_path: Path) -> None:
    ids(100).tofile(tmp_path / "a.bin")
    source = TokenFilesSourceConfig(paths=[str(tmp_path)])
    assert source_fingerprint(source) == plan_source(source, 0.0).fingerprint


class Files(http.server.BaseHTTPRequestHandler):
    """Files of `content`, in ranges like a real server's, or whole where `ranges` is off."""

    content: ClassVar[dict[str, bytes]] = {}
    ranges: ClassVar[bool] = True
    sent: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data = self.content.get(self.path)
        if data is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range", "")
        part = slice(None)
        if asked and self.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            part = slice(int(first), int(last) + 1)
        body = data[part]
        self.send_response(206 if part != slice(None) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{zlib.crc32(data)}"')
        self.end_headers()
        if self.command == "GET":
            self.sent.append(len(body))
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("content", {}), ("ranges", True), ("sent", [])):
        monkeypatch.setattr(Files, name, value)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def web_config(tmp_path: Path, *urls: str) -> DatasetConfig:
    return DatasetConfig(
        root=str(tmp_path / "data"), dataset_name="web", dataset_config="a", tokenizer=None,
        source=TokenFilesSourceConfig(paths=list(urls), vocab_size=60_000, eos_id=0),
    )  # fmt: skip


def test_files_of_a_web_server_are_fetched_once_and_a_change_is_noticed(
    web: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = ids(3000, 1)
    Files.content["/a.bin"] = tokens.tobytes()
    config = web_config(tmp_path, f"{web}/a.bin")
    prepared = ensure_prepared(config, progress=False)
    assert sum(info.num_tokens for info in prepared.manifest.splits.values()) >= len(tokens)
    fetched = sum(Files.sent)
    assert fetched < 3 * len(Files.content["/a.bin"])
    ensure_prepared(config, progress=False)
    assert sum(Files.sent) == fetched
    Files.content["/a.bin"] = ids(3000, 2).tobytes()
    with pytest.raises(DataError, match=r"the text of dataset\.source has changed"):
        ensure_prepared(config, progress=False)
    del Files.content["/a.bin"]
    with pytest.raises(DataError, match=r"a\.bin: no such file, or no token files there; .*holds"):
        ensure_prepared(config, progress=False)
    unreachable = web_config(tmp_path, "http://127.0.0.1:9/a.bin")
    ensure_prepared(unreachable, progress=False)
    assert "not asked whether they have changed: " in caplog.text


def test_a_file_that_changes_while_it_is_read_is_an_error(web: str) -> None:
    Files.content["/a.bin"] = ids(3000, 1).tobytes()
    plan = plan_source(TokenFilesSourceConfig(paths=[f"{web}/a.bin"]), 0.0)
    Files.content["/a.bin"] = ids(3000, 2).tobytes()
    reading = Reading(
        source=TokenFilesSourceConfig(paths=[f"{web}/a.bin"]), rows=False, filters=None,
        with_digests=False, vocab_size=EOS + 1, eos_id=EOS,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"a\.bin: changed while it was being read"):
        list(read_shard(plan.shards[0], reading, Counts()))


def test_a_server_without_ranges_is_one_line(web: str, tmp_path: Path) -> None:
    Files.content["/a.bin"] = ids(9000, 1).tobytes()
    Files.ranges = False
    problem = rf"^{web}/a\.bin: the server sends no ranges of files; download .* nginx"
    with pytest.raises(StorageError, match=problem) as error:
        ensure_prepared(web_config(tmp_path, f"{web}/a.bin"), progress=False)
    assert error.value.exit_code == 2


def test_files_of_a_store_are_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def expand(url: str, *_: object) -> list[SourceFile]:
        together.wait(60)
        return [SourceFile(url, url, 1, version="v")]

    monkeypatch.setattr(token_files, "_expand_url", expand)
    source = TokenFilesSourceConfig(paths=["https://host/b", "https://host/a/"])
    assert [file.path for file in token_files._remote_files(source)] == [
        "https://host/a",
        "https://host/b",
    ]
