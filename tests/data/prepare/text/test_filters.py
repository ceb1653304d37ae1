import random
import sysconfig
from pathlib import Path

import pytest

from tests.data.prepare.text.reading import read_all
from toolkit.data.config import FilesSourceConfig, FiltersConfig
from toolkit.data.prepare.text import cuts, filters, reading
from toolkit.data.prepare.text.filters import reason_to_leave_out, repetition, text_windows
from toolkit.data.prepare.text.reading import Counts


def score(text: str) -> float:
    return repetition(text_windows(text))


def prose() -> str:
    """English as people write it, without its line ends."""
    words = (Path(__file__).parents[4] / "README.md").read_text().split()
    return " ".join(words)


def chinese(length: int) -> str:
    """Characters drawn with the skew of a real text, without any white space."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    weights = [1 / (rank + 3) for rank in range(3000)]
    return "".join(draw.choices(characters, weights, k=length))


def test_scale_of_repetition() -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    code = [(stdlib / name).read_text() for name in ("argparse.py", "heapq.py", "ast.py")]
    notice = "All rights reserved. Click here to accept cookies and continue. "
    assert score(prose()) < 0.10
    assert score(chinese(20_000)) < 0.02
    assert all(0.02 < score(text) < 0.40 for text in code)
    assert score(notice * 20) > 0.90
    assert score("点击这里接受所有并继续阅读本网站的内容" * 20) > 0.90
    assert score("a" * 10_000) > 0.99
    assert score(prose() + notice * 10) < score(prose() + notice * 100)


@pytest.mark.parametrize("text", ["", "short", "x" * 31])
def test_text_shorter_than_one_ngram_repeats_nothing(text: str) -> None:
    assert score(text) == 0.0


def test_long_text_is_measured_on_a_share_of_its_ngrams() -> None:
    draw = random.Random(1)
    half = "".join(draw.choices("abcdefghij ", k=400_000))
    assert score(half) < 0.001
    assert score(half + half) == pytest.approx(0.5, abs=0.01)


def test_huge_text_is_measured_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MAX_SCORED_BYTES", 1 << 17)
    text = chinese(200_000)
    windows = text_windows(text)
    assert len(windows) == 64
    assert sum(map(len, windows)) <= 1 << 17
    assert windows[-1].decode() == text[-512:]
    assert repetition(windows) < 0.02
    assert score("说了又说的话" * 40_000) > 0.9


def test_limits_are_inclusive_and_named_by_their_setting() -> None:
    rules = FiltersConfig(min_characters=3, max_characters=5, max_repetition=0.5)
    assert [reason_to_leave_out(text, rules) for text in ("éé", "ééé", "ééééé", "éééééé")] == [
        "min_characters", None, None, "max_characters",
    ]  # fmt: skip
    loose = FiltersConfig(max_repetition=0.5)
    assert reason_to_leave_out("again and again. " * 50, loose) == "max_repetition"
    assert reason_to_leave_out("", FiltersConfig()) is None


def test_long_files_are_decided_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, cuts):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1024)
    texts = {"a": "é" * 1500, "b": "é" * 1501, "c": "say it again. " * 200, "d": prose()[:2900]}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    source = FilesSourceConfig(paths=[str(tmp_path)])

    def kept(counts: Counts, **limits) -> set[str]:
        pieces = read_all(source, counts, filters=FiltersConfig(**limits))
        return {piece.identity[0] for piece in pieces}

    counts = Counts()
    # 1,500 characters of two bytes: the size in bytes alone does not tell.
    assert kept(counts, max_characters=1500) == {"a"}
    assert counts.filtered_documents == {"max_characters": 3}
    assert kept(Counts(), min_characters=1501) == {"b", "c", "d"}
    counts = Counts()
    assert kept(counts, max_repetition=0.5) == {"d"}
    assert counts.filtered_documents == {"max_repetition": 3}


def test_rows_are_filtered_by_all_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "ab", "a": ["c"]}\n{"q": "ab", "a": ["cd"]}\n')
    source = FilesSourceConfig(paths=[str(tmp_path)])
    pieces = read_all(source, rows=True, filters=FiltersConfig(min_characters=5))
    assert [piece.row for piece in pieces] == [{"q": "ab", "a": ["cd"]}]
