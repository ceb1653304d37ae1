"""All that is wrong is told at once, and what is right is still built."""

from typing import Any

import pytest

from toolkit.config import convert
from toolkit.config.base import Seed
from toolkit.config.check import check
from toolkit.config.paths import local_path, path_problem
from toolkit.errors import ConfigError, SeveralErrors
from toolkit.experiment.config import ExperimentConfig
from toolkit.models.presets import preset

MODEL = {"model": preset("quickstart")}


def problems(**data: Any) -> list[str]:
    return [str(error) for error in check({**MODEL, **data}, ExperimentConfig).errors]


def test_names_types_and_values_of_all_sections_are_told_together() -> None:
    with pytest.raises(SeveralErrors) as error:
        convert(
            {
                "model": {**preset("quickstart"), "d_model": -1, "num_heads": 0, "norm": "rms"},
                "train_module": {"optim": {"type": "adamw", "lrr": 1, "betas": [0.9]}},
                "trainer": {"hard_stop": {"value": 0}, "callbacks": {"console_logger": 3}},
                "sed": 1,
            },
            ExperimentConfig,
        )
    assert [str(one).partition(";")[0] for one in error.value.errors] == [
        "sed: no such field",
        "model.norm: 'rms' is not one of layer_norm, rms_norm",
        "train_module.optim.lrr: no such field",
        "train_module.optim.betas: expected a list of 2 values, not [0.9]",
        "trainer.callbacks.console_logger: expected a mapping with enabled, interval, not 3",
        "model: d_model must be greater than 0, not -1",
        "model: num_heads must be greater than 0, not 0",
        "trainer.hard_stop: value must be greater than 0, not 0",
    ]


def test_what_is_right_is_built_without_what_is_wrong() -> None:
    checked = check({**MODEL, "seed": "x", "dataset": {"sequence_length": 64}}, ExperimentConfig)
    assert [str(error) for error in checked.errors] == ["seed: expected a whole number, not 'x'"]
    assert (checked.config.seed, checked.config.dataset.sequence_length) == (0, 64)


def test_a_switch_with_further_values_names_them_all() -> None:
    layout = {"name": "fsdp", "reshard_after_forward": "maybe"}
    module = {"optim": {"type": "adamw"}, "compile_model": "perhaps", "dp_config": layout}
    assert sorted(problems(train_module=module)) == [
        "train_module.compile_model: 'perhaps' is not one of auto, false, true",
        "train_module.dp_config.reshard_after_forward: 'maybe' is not one of auto, false, true",
    ]


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_seeds_are_whole_numbers_of_64_bits(seed: int) -> None:
    assert problems(seed=seed, data_loader={"seed": seed}) == []
    assert convert(seed, Seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**64, 10**400])
def test_other_seeds_are_refused(seed: int) -> None:
    assert problems(seed=seed)[0].startswith("seed: must lie between 0 and 2^64 - 1, not ")
    assert problems(data_loader={"global_batch_size": 2**63})[0].startswith(
        "data_loader.global_batch_size: must fit in 64 bits, not 9223372036854775808"
    )


@pytest.mark.parametrize("text", ["\udcff", "a\0b", "x\ud800"])
def test_text_that_is_none_is_refused_wherever_it_stands(text: str) -> None:
    said = f"{text!r} is not UTF-8 text"
    assert problems(description=text) == [f"description: {said}"]
    files = {"source": {"type": "files", "paths": ["a", text]}}
    assert problems(dataset=files)[0].startswith(f"dataset.source.paths.1: {said}; a file of such")
    engine = {"name": "zero1", "deepspeed_config": {"a": [{"b": text}]}}
    assert problems(train_module={"dp_config": engine}) == [
        f"train_module.dp_config.deepspeed_config.a.0.b: {said}"
    ]
    assert problems(**{text: 1}) == [f"the name {said}"]


@pytest.mark.parametrize(
    "place",
    ["run.root", "run.work_dir", "dataset.root", "store.tokenized_cache_dir",
     "store.hf_cache_dir", "trainer.stop_file", "dataset.source.paths", "dataset.tokenizer.path"],
)  # fmt: skip
@pytest.mark.parametrize("url", ["s3://b/run", "http://x/y", "gs:/b"])
def test_a_url_is_no_local_path(place: str, url: str) -> None:
    section, *middle, name = place.split(".")
    value: Any = {name: [url] if name == "paths" else url}
    for part in middle:
        value = {part: {"type": "hf" if part == "tokenizer" else "files", **value}}
    at = f"{place}.0" if name == "paths" else place
    (said,) = problems(**{section: value})
    assert said.startswith(f"{at}: {url!r} is a URL, and this must be on this machine; ")
    assert "store.permanent_root" in said


def test_where_urls_belong_they_are_taken() -> None:
    saver = {"checkpointer": {"upload_to": "s3://b/run"}}
    assert (
        problems(
            trainer={"load_path": "gs://b/run", "callbacks": saver},
            store={"permanent_root": "gdrive://x"},
            dataset={"source": {"type": "token_files", "paths": ["s3://b/part.npy"]}},
        )
        == []
    )
    assert problems(store={"permanent_root": "s3:/b"}) == [
        "store.permanent_root: 's3:/b': a URL begins with s3://"
    ]


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ("", "local", "empty; write . for the current folder"),
        ("", "name", "an empty name"),
        ("a" * 256, "name", f"the name {'a' * 20}... has 256 bytes; 255 at most"),
        ("x/" + "ä" * 128, "local", f"the name {'ä' * 20}... has 256 bytes; 255 at most"),
        ("/".join(["a" * 200] * 21), "local", "a path of 4220 bytes; 4095 at most"),
        ("~nouser/x", "local", "~nouser: no such user on this machine"),
        ("file:///tmp/x", "local", "a URL; write the path itself: /tmp/x"),
        ("a" * 255, "local", None),
        ("~/x", "local", None),
        ("C:\\x", "local", None),
    ],
)
def test_paths_that_cannot_be(text: str, kind: str, problem: str | None) -> None:
    assert path_problem(text, kind) == problem
    if problem is not None and kind == "local":
        with pytest.raises(ConfigError) as error:
            local_path(text, "--out")
        assert str(error.value) == f"--out: {problem}"
