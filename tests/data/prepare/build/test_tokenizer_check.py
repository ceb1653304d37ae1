"""`transformers` is asked about a tokenizer beside the encoding, once, and nothing is lost when it
disagrees."""

import functools
import importlib
import os
import sys
from pathlib import Path

import pytest

from tests.data.corpus import files_config, write_texts
from toolkit.data.config import HFTokenizerConfig
from toolkit.data.prepare.build import prepare, vocabulary, workers
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.build.workers import Errand
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from toolkit.errors import DataError


def test_a_check_that_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ByteTokenizer().save(tmp_path / "tok")
    tokenizer = HFTokenizerConfig(path=str(tmp_path / "tok"))
    config = files_config(
        tmp_path / "data", write_texts(tmp_path / "text", ["ab"]), tokenizer=tokenizer
    )
    failing = functools.partial(load_tokenizer, tmp_path / "nowhere")
    monkeypatch.setattr(vocabulary, "settle", lambda *_, **__: failing())
    for _ in range(2):
        with pytest.raises(DataError, match=r"nowhere/tokenizer.json: no such file"):
            ensure_prepared(config, progress=False)
    monkeypatch.setattr(vocabulary, "settle", lambda *_, **__: "9.9")
    prepared = ensure_prepared(config, progress=False)
    assert prepared.manifest.tokenizer_checked == "9.9"


def test_workers_check_beside_the_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    texts = write_texts(tmp_path / "text", ["some text\n" * 40_000])
    config = files_config(tmp_path / "data", texts, num_processes=2)
    answers: list[object] = []
    failing = functools.partial(load_tokenizer, tmp_path / "nowhere")
    errands = [Errand(failing, answers.append), Errand(os.getpid, answers.append)]
    monkeypatch.setattr(prepare, "tokenizer_check", lambda *_: errands.pop(0))
    with pytest.raises(DataError, match=r"nowhere/tokenizer.json: no such file"):
        ensure_prepared(config, progress=False)
    assert ensure_prepared(config, progress=False).num_tokens("train") == 400_001
    assert len(answers) == 1
    assert answers != [os.getpid()]


def _imports() -> list[str]:
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018
    return [name for name in ("torch", "transformers") if sys.modules.get(name) is not None]


def test_a_worker_asks_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    texts = write_texts(tmp_path / "text", ["some text\n" * 100])
    config = files_config(tmp_path / "data", texts, num_processes=2)
    answers: list[object] = []
    monkeypatch.setattr(prepare, "tokenizer_check", lambda *_: Errand(_imports, answers.append))
    ensure_prepared(config, progress=False)
    assert answers == [["transformers"]]
    assert "PyTorch" not in capfd.readouterr().err
