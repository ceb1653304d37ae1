"""From a mix as it is written to its sources, and to their token files."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import files_config, random_text, write_texts
from toolkit.config import convert
from toolkit.data.config import (
    BPETokenizerConfig,
    DatasetConfig,
    FilesSourceConfig,
    FiltersConfig,
    VariableInstancesConfig,
)
from toolkit.data.order.config import MixConfig, inline_mixes, mix_names, read_mix
from toolkit.data.order.resolve import resolve_mix, resolve_schedule
from toolkit.data.prepare.corpus import ensure_mix_prepared
from toolkit.data.tokens.prepared import dataset_folder
from toolkit.errors import ConfigError, DataError


def dataset(sources: dict[str, Any], *, schedule: Any = (), **changes: Any) -> DatasetConfig:
    mix = convert({"sources": sources, "schedule": list(schedule)}, MixConfig)
    return DatasetConfig(**{"mix": mix, "sequence_length": 16, **changes})


def write_mix(path: Path, sources: dict[str, Any], **more: Any) -> str:
    path.write_text(json.dumps({"sources": sources, **more}))
    return str(path)


@pytest.mark.parametrize("name", mix_names())
def test_every_packaged_mix_resolves(name: str) -> None:
    mix = read_mix(name)
    assert mix.description
    config = DatasetConfig(mix=mix)
    sources = resolve_mix(config)
    assert {source.name for source in sources} == mix.sources.keys()
    for segment in resolve_schedule(config):
        assert sum(segment.shares.values()) == 1
    inlined = convert(inline_mixes(name), MixConfig)
    assert resolve_mix(DatasetConfig(mix=inlined)) == sources


def test_a_source_takes_from_the_dataset_what_it_does_not_say() -> None:
    config = dataset(
        {
            "b": {"ratio": 0.3, "dataset_name": "books", "deduplicate": False},
            "a": {"ratio": 0.1, "source": {"type": "python_stdlib"}, "dataset_config": "v2"},
        },
        root="r",
        dataset_config="v1",
        filters=FiltersConfig(min_characters=9),
        deduplicate=True,
    )
    a, b = resolve_mix(config)
    assert [a.name, a.ratio, b.name, b.ratio] == ["a", Fraction(1, 4), "b", Fraction(3, 4)]
    assert str(dataset_folder(a.dataset)) == "r/a/v2"
    assert str(dataset_folder(b.dataset)) == "r/books/v1"
    assert (a.dataset.deduplicate, b.dataset.deduplicate) == (True, False)
    assert a.dataset.filters == b.dataset.filters == FiltersConfig(min_characters=9)
    assert a.dataset.mix is b.dataset.mix is None


def test_nested_mixes_multiply_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_mix(tmp_path / "in.json", {"x": {"ratio": 1}, "y": {"ratio": 3, "max_repetitions": 2}})
    config = dataset(
        {
            "file": {"ratio": 1, "mix": "in.json", "max_repetitions": 5, "dataset_config": "z"},
            "here": {"ratio": 1, "mix": {"v": {"ratio": 0.1}, "w": {"ratio": 0.2}}},
            "web": {"ratio": 2},
        },
        schedule=[{"at_tokens": 100, "ratios": {"web": 0}}],
    )
    found = {source.name: source for source in resolve_mix(config)}
    assert {name: source.ratio for name, source in found.items()} == {
        "file/x": Fraction(1, 16),
        "file/y": Fraction(3, 16),
        "here/v": Fraction(1, 12),
        "here/w": Fraction(1, 6),
        "web": Fraction(1, 2),
    }
    assert [found[name].max_repetitions for name in ("file/x", "file/y", "web")] == [5, 2, None]
    assert str(dataset_folder(found["file/x"].dataset)) == "data/x/z"
    first, second = resolve_schedule(config)
    assert (first.at_tokens, second.at_tokens) == (0, 112)
    assert second.shares["here/w"] == Fraction(1, 3)
    assert second.shares["web"] == 0
    inlined = convert(inline_mixes(config.mix.to_dict() if config.mix else None), MixConfig)
    (tmp_path / "in.json").unlink()
    assert resolve_mix(config.replace(mix=inlined)) == list(found.values())


def test_order_in_the_file_does_not_matter() -> None:
    sources = {"a": {"ratio": 0.1}, "b": {"ratio": 0.2}}
    backwards = dict(reversed(sources.items()))
    assert resolve_mix(dataset(sources)) == resolve_mix(dataset(backwards))


def test_a_source_that_never_comes_is_left_out() -> None:
    sources = {"a": {"ratio": 1}, "b": {"ratio": 0}, "c": {"ratio": 0}}
    config = dataset(sources, schedule=[{"at_tokens": 32, "ratios": {"c": 1}}])
    assert [source.name for source in resolve_mix(config)] == ["a", "c"]


@pytest.mark.parametrize(
    ("sources", "schedule", "message"),
    [
        ({"a": {"ratio": 1, "mix": "nomix"}}, [], "mix nomix: no such mix or file; mixes: "),
        ({"a": {"ratio": 1, "mix": "web_code_meth"}}, [], "did you mean 'web_code_math'"),
        ({"a": {"ratio": 1, "mix": "no/mix.json"}}, [], "mix no/mix.json: no such file"),
        (
            {"a": {"ratio": 1, "mix": "loop.json"}},
            [],
            "holds itself .loop.json -> s.json",
        ),
        ({"a": {"ratio": 1, "mix": "web_then_math"}}, [], "web_then_math: has a schedule"),
        ({"a": {"ratio": 1, "mix": "bad.json"}}, [], r"mix bad.json: sources.x.ratio: required"),
        ({"a": {"ratio": 1, "mix": {"x/y": {"ratio": 1}}}}, [], "a.mix: name of a source must be"),
        ({"a": {"ratio": 1, "mix": {"x": {"ratio": 1}}, "max_tokens": 5}}, [], "a is a mix itself"),
        (
            {"a": {"ratio": 1}, "b": {"ratio": 1, "dataset_name": "a", "deduplicate": True}},
            [],
            "a and b would both be kept in data/a/default",
        ),
        (
            {"a": {"ratio": 1}, "b": {"ratio": 2e-7}},
            [],
            "b has a share of 2.0e-07, less than 1e-06",
        ),
        (
            {"a": {"ratio": 1}},
            [{"at_tokens": 5, "ratios": {"a": 0}}],
            "dataset.mix.schedule.0: all ratios are 0",
        ),
    ],
)
def test_mixes_that_make_no_sense_are_named(
    sources: dict[str, Any],
    schedule: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_mix(tmp_path / "loop.json", {"x": {"ratio": 1, "mix": "s.json"}})
    write_mix(tmp_path / "s.json", {"x": {"ratio": 1, "mix": "./loop.json"}})
    write_mix(tmp_path / "bad.json", {"x": {}})
    with pytest.raises(ConfigError, match=message):
        resolve_mix(dataset(sources, schedule=schedule))


def test_a_source_may_not_have_the_name_of_the_evaluation_of_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.mix\.sources\.val: this name is taken by"):
        resolve_mix(dataset({"val": {"ratio": 1}, "a": {"ratio": 1}}))
    nested = write_mix(tmp_path / "in.json", {"val": {"ratio": 1}})
    inside = {"x": {"ratio": 1, "mix": {"val": {"ratio": 1}}}, "y": {"ratio": 1, "mix": nested}}
    assert [source.name for source in resolve_mix(dataset(inside))] == ["x/val", "y/val"]


def test_the_same_corpus_may_be_in_a_mixture_twice() -> None:
    twice = {"a": {"ratio": 1}, "b": {"ratio": 2, "dataset_name": "a"}}
    assert len(resolve_mix(dataset(twice))) == 2


def test_rows_of_variable_length_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="variable length do not mix"):
        resolve_mix(dataset({"a": {"ratio": 1}}, instances=VariableInstancesConfig()))


def text_mix(tmp_path: Path, **changes: Any) -> DatasetConfig:
    sources = {}
    for number, name in enumerate(("one", "two")):
        folder = write_texts(tmp_path / name, [random_text(40, seed) for seed in range(3)])
        source = FilesSourceConfig(paths=[str(folder)]).to_dict()
        sources[name] = {"ratio": 1 + number, "source": source}
    settings = {"root": str(tmp_path / "data"), "validation_fraction": 0.0, "num_processes": 1}
    return dataset(sources, **{**settings, **changes})


def test_every_source_is_prepared_with_the_one_tokenizer(tmp_path: Path) -> None:
    config = text_mix(tmp_path)
    found = ensure_mix_prepared(config, progress=False)
    assert [source.name for source, _ in found] == ["one", "two"]
    assert {prepared.vocab_size for _, prepared in found} == {257}
    assert found[1][1].folder == tmp_path / "data" / "two" / "default"


def test_a_bpe_tokenizer_is_trained_once_on_all_sources(tmp_path: Path) -> None:
    config = text_mix(tmp_path, tokenizer=BPETokenizerConfig(vocab_size=300))
    found = ensure_mix_prepared(config, progress=False)
    one, two = (prepared.manifest.tokenizer_fingerprint for _, prepared in found)
    assert one == two
    (folder,) = (tmp_path / "data" / ".mix-tokenizers").glob("[!.]*")
    again = ensure_mix_prepared(config, progress=False)
    assert [p.manifest for _, p in again] == [p.manifest for _, p in found]
    # The tokenizer comes back from the token files, whether or not the text is still there.
    for file in (*folder.iterdir(), *(tmp_path / "one").iterdir()):
        file.unlink()
    folder.rmdir()
    ensure_mix_prepared(config, progress=False, check_text=False)
    assert (folder / "tokenizer.json").is_file()
    with pytest.raises(DataError, match=r"dataset\.mix: one: .*no file with text .*source=null"):
        ensure_mix_prepared(config, progress=False)


def test_bpe_cannot_be_trained_on_token_files(tmp_path: Path) -> None:
    config = text_mix(tmp_path, tokenizer=BPETokenizerConfig(vocab_size=300))
    assert config.mix is not None
    sources = config.mix.sources | {"two": config.mix.sources["two"].replace(source=None)}
    mix = config.mix.replace(sources=sources)
    with pytest.raises(ConfigError, match=r"bpe is trained on text, but two of dataset\.mix"):
        ensure_mix_prepared(config.replace(mix=mix), progress=False)


def test_sources_of_different_tokenizers_do_not_mix(tmp_path: Path) -> None:
    from toolkit.data.prepare.build.prepare import prepare_dataset

    texts = write_texts(tmp_path / "t", [random_text(50)])
    root = tmp_path / "data"
    prepare_dataset(files_config(root, texts, dataset_name="one"), progress=False)
    bpe = BPETokenizerConfig(vocab_size=300)
    prepare_dataset(files_config(root, texts, dataset_name="two", tokenizer=bpe), progress=False)
    config = dataset({"one": {"ratio": 1}, "two": {"ratio": 1}}, root=str(root))
    with pytest.raises(ConfigError, match="one and two do not mix: their tokenizers differ"):
        ensure_mix_prepared(config, progress=False)


def test_errors_of_a_source_name_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.mix: one: .*no prepared data"):
        ensure_mix_prepared(dataset({"one": {"ratio": 1}}, root=str(tmp_path)), progress=False)
