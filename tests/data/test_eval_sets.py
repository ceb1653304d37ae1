"""Sets that are evaluated only: prepared with the training data's tokenizer, never trained on."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.data.config import (
    BPETokenizerConfig,
    DataConfig,
    DataLoaderConfig,
    DatasetConfig,
    EvalSetConfig,
    MixConfig,
    MixSourceConfig,
)
from toolkit.data.corpus_info import read_corpus, without_sources
from toolkit.data.loader import get_dataloaders
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.data.source_config import FilesSourceConfig
from toolkit.errors import ConfigError, DataError
from toolkit.train.eval_sums import EvalSums, evaluate_sets


def source(folder: Path, name: str, words: str, number: int = 60) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    rows = [json.dumps({"text": f"{words} {n} {n * n} {words}"}) for n in range(number)]
    path.write_text("\n".join(rows))
    return {"source": FilesSourceConfig(paths=[str(path)])}


def config_of(folder: Path, **changes: Any) -> DataConfig:
    dataset: dict[str, Any] = {
        "root": str(folder / "data"), "dataset_name": "trained", "sequence_length": 16,
        "validation_fraction": 0.2, "num_processes": 1,
        **source(folder, "trained", "aa bb"),
        "eval_sets": {
            "wiki": EvalSetConfig(**source(folder, "wiki", "cc")),
            "code": EvalSetConfig(**source(folder, "code", "dd ee", 30), dataset_name="programs"),
        },
    }  # fmt: skip
    loader = DataLoaderConfig(global_batch_size=64, eval_tokens=None)
    return DataConfig(dataset=DatasetConfig(**(dataset | changes)), data_loader=loader)


def names_of(config: DataConfig) -> dict[str, int]:
    _, loaders = get_dataloaders(config)
    found = evaluate_sets(
        loaders,
        lambda batch: EvalSums(
            batch["label_mask"].sum().double(), batch["label_mask"].sum().double()
        ),
    )
    assert found is not None
    return {name: int(sums.num_targets) for name, sums in found.items()}


def test_sets_are_evaluated_whole_and_counted_in_no_total(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    info = prepare_corpus(config, progress=False)
    assert list(info.parts) == [""]
    assert {path.name for path in (tmp_path / "data").iterdir()} >= {"trained", "wiki", "programs"}
    counts = names_of(config)
    assert list(counts) == ["wiki", "code", "val"]
    wiki = info.eval_parts["wiki"][1]
    assert wiki.num_tokens("val") == 0
    assert counts["wiki"] == wiki.num_tokens("train") // 16 * 16
    # A run goes on with its prepared data alone.
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    moved = config.replace(dataset=without_sources(config.dataset))
    assert names_of(moved) == counts


def test_a_mixture_sums_its_own_sources_only(tmp_path: Path) -> None:
    sources = {
        name: MixSourceConfig(ratio=1, **source(tmp_path, name, f"{name} ff"))
        for name in ("one", "two")
    }
    config = config_of(
        tmp_path,
        source=None,
        mix=MixConfig(sources=sources),
        tokenizer=BPETokenizerConfig(vocab_size=300),
    )
    info = prepare_corpus(config, progress=False)
    counts = names_of(config)
    assert list(counts) == ["wiki", "code", "one", "two", "val"]
    assert counts["val"] == counts["one"] + counts["two"]
    fingerprints = {
        prepared.manifest.tokenizer_fingerprint
        for _, prepared in (*info.parts.values(), *info.eval_parts.values())
    }
    assert len(fingerprints) == 1  # the one that was trained for the mixture
    again = read_corpus(config)
    assert again is not None
    assert set(again.eval_parts) == {"wiki", "code"}


@pytest.mark.parametrize(("sets", "error", "message"), [
    ({"val": {}}, ValueError, "val is what held-out documents are called"),
    ({"a": {"dataset_name": "trained"}}, ConfigError,
     r"eval_sets\.a: its token files would be in .*trained/default, like those of training"),
    ({"a": {"dataset_name": "same"}, "b": {"dataset_name": "same"}}, ConfigError,
     r"eval_sets\.b: its token files .* like those of a; give it a dataset_name"),
])  # fmt: skip
def test_names_and_folders_are_kept_apart(
    tmp_path: Path, sets: Any, error: type[Exception], message: str
) -> None:
    given = {name: EvalSetConfig(**one) for name, one in sets.items()}
    with pytest.raises(error, match=message):
        read_corpus(config_of(tmp_path, eval_sets=given))


def test_a_set_without_a_whole_row_is_an_error(tmp_path: Path) -> None:
    sets = {"few": EvalSetConfig(**source(tmp_path, "few", "x", 1))}
    config = config_of(tmp_path, eval_sets=sets, sequence_length=64)
    with pytest.raises(DataError, match=r"eval_sets\.few: .* has 8 tokens, less than one instance"):
        get_dataloaders(config)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    prepare_corpus(config_of(tmp_path), progress=False)
    other = config_of(tmp_path, tokenizer=None, source=None)
    manifest = tmp_path / "data/wiki/default/dataset.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"tokenizer_fingerprint": "another"}))
    other = other.replace(dataset=without_sources(other.dataset))
    with pytest.raises(
        ConfigError, match=r"^dataset\.eval_sets\.wiki: .* do not go together: their"
    ):
        get_dataloaders(other)


def test_errors_of_a_set_name_its_own_settings(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prepare_corpus(config, progress=False)
    source(tmp_path, "wiki", "other")
    with pytest.raises(DataError) as error:
        prepare_corpus(config, progress=False)
    place, text = "dataset.eval_sets.wiki", str(error.value)
    assert f"the text of {place}.source has changed). To keep them, give another {place}." in text
    assert f"anew, remove them (rm -r {tmp_path}/data/wiki/default) and repeat" in text
    assert text.endswith(f"use them as they are with {place}.source=null")
    assert text.count("dataset.") == 3
