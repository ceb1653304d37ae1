import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import files_config, random_text, write_texts
from tests.data.prepare.build.test_build import text_of, token_config
from toolkit.data.prepare.build import join
from toolkit.data.prepare.build.join import Duplicates
from toolkit.data.prepare.build.parts import DOCUMENT, DOCUMENTS_NAME, part_folder
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.text import cuts, reading, sources


def first_of_each(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


@pytest.mark.parametrize("bucket_documents", [1 << 21, 10])
def test_later_ones_are_found_in_any_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_documents: int
) -> None:
    monkeypatch.setattr(join, "BUCKET_DOCUMENTS", bucket_documents)
    draw = random.Random(0)
    parts, expected, seen = [], [], set()
    for index in range(7):
        records = [
            (draw.randrange(30), draw.randrange(2), 10, draw.randrange(2)) for _ in range(40)
        ]
        part_folder(tmp_path, index).mkdir()
        path = part_folder(tmp_path, index) / DOCUMENTS_NAME
        np.array(records, dtype=DOCUMENT).tofile(path)
        parts.append(records)
        for record in records:
            expected.append(record[:2] in seen)
            seen.add(record[:2])
    workplace = tmp_path / "work"
    workplace.mkdir()
    found = Duplicates(tmp_path, len(parts), workplace)
    flags = iter(expected)
    for index, records in enumerate(parts):
        wanted: dict[int, list[bool]] = {0: [], 1: []}
        for record in records:
            wanted[record[3]].append(next(flags))
        assert found.of(index, "train").tolist() == wanted[0]
        assert found.of(index, "val").tolist() == wanted[1]
    assert found.count == sum(expected)
    assert sum(found.text_bytes.values()) == 10 * sum(expected)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_first_of_equal_documents_stays_whatever_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_processes: int
) -> None:
    draw = random.Random(0)
    texts = [f"document {draw.randrange(300)} " + "é" * 3000 for _ in range(1000)]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:500]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[500:]))
    config = files_config(
        tmp_path / "data", folder, deduplicate=True, validation_fraction=0.3,
        num_processes=num_processes,
    )  # fmt: skip
    prepared = ensure_prepared(config)
    train, val = text_of(prepared, "train"), text_of(prepared, "val")
    left = first_of_each(texts)
    assert sorted(train + val) == sorted(left)
    assert [t for t in left if t in set(train)] == train
    assert [t for t in left if t in set(val)] == val
    assert prepared.manifest.filtered_documents == {"duplicate": 1000 - len(left)}
    for split, kept in (("train", train), ("val", val)):
        info = prepared.manifest.splits[split]
        assert info.text_bytes == sum(len(t.encode()) for t in kept)
        starts = prepared.document_starts(split).tolist()
        ends = [*starts[1:], info.num_tokens]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        assert lengths == [len(t.encode()) + 1 for t in kept]


def test_documents_over_several_shards_are_compared_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MIN_SHARD_BYTES", "MAX_SHARD_BYTES"):
        monkeypatch.setattr(sources, name, 2048)
    for module in (reading, cuts):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1024)
    long, other = random_text(200), random_text(200, seed=1)
    texts = [long, "short", other, long[:-1], long, "short", "\ufeff" + other, "end"]
    folder = write_texts(tmp_path / "text", texts)
    (folder / "z.jsonl").write_text(json.dumps({"text": other}) + "\n")
    prepared = ensure_prepared(files_config(tmp_path / "data", folder, deduplicate=True))
    assert text_of(prepared) == [long, "short", other, long[:-1], "end"]
    assert prepared.manifest.filtered_documents == {"duplicate": 4}
    assert prepared.manifest.splits["train"].text_bytes == sum(map(len, text_of(prepared)))


def test_tokens_are_compared_by_their_ids(tmp_path: Path) -> None:
    values = np.array([1, 2, 50, 3, 50, 1, 2, 50, 1, 2], dtype=np.uint16)
    values.tofile(tmp_path / "a.bin")
    prepared = ensure_prepared(
        token_config(tmp_path / "data", tmp_path / "a.bin", deduplicate=True)
    )
    assert prepared.tokens("train").tolist() == [1, 2, 50, 3, 50]
    assert prepared.manifest.filtered_documents == {"duplicate": 2}
