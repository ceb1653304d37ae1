"""Raw texts of hub data sets: kept where the store says, within its limit."""

import logging
from pathlib import Path

import pytest

from tests.data.prepare.store.stores import ensure, set_last_used
from toolkit.data.config import DatasetConfig, HubSourceConfig, StoreConfig
from toolkit.data.prepare.store.cache import raw_text_cache


def test_raw_texts_go_by_last_use_and_never_while_they_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    root = tmp_path / "raw"
    (root / "theirs").mkdir(parents=True)
    (root / "theirs" / "data").write_bytes(bytes(5000))

    def hub(name: str) -> DatasetConfig:
        return DatasetConfig(source=HubSourceConfig(name=name))

    def store(limit: float | None) -> StoreConfig:
        return StoreConfig(hf_cache_dir=str(root), max_cache_gb=limit)

    folders = []
    for age, name in enumerate(("org/one", "org/two", "/local/three")):
        with raw_text_cache(hub(name), store(None)) as folder:
            assert folder is not None
            (Path(folder) / "data.arrow").write_bytes(bytes(1000))
        folders.append(Path(folder))
        set_last_used(folders[-1], 1000.0 + age)
    assert [folder.name for folder in folders] == ["org--one", "org--two", "local--three"]
    with raw_text_cache(hub("org/one"), store(None)):
        set_last_used(folders[0], 1.0)
        with raw_text_cache(hub("org/four"), store(2.5e-6)):
            assert [path.exists() for path in folders] == [True, False, True]
    set_last_used(folders[0], 1.0)
    with raw_text_cache(hub("org/four"), store(1.5e-6)) as folder:
        assert [path.exists() for path in folders] == [False, False, True]
        assert folder is not None
        (Path(folder) / "data.arrow").write_bytes(bytes(1000))
    assert [path.exists() for path in folders] == [False, False, False]
    assert (Path(folder) / "data.arrow").exists()
    assert (root / "theirs" / "data").exists()
    assert not caplog.records


def test_raw_texts_of_a_hub_data_set_go_where_the_store_says(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = HubSourceConfig(name=str(texts), streaming=False)
    config = DatasetConfig(root=str(tmp_path / "data"), source=source, validation_fraction=0.0)
    prepared = ensure(config, StoreConfig(hf_cache_dir=str(tmp_path / "raw")))
    assert prepared.num_documents("train") == 2
    assert [path.suffix for path in (tmp_path / "raw").rglob("*.arrow")] == [".arrow"]
