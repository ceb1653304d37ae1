"""What a start refuses, it refuses at once and before torch; a dry run says the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.checkpoint.folder import METADATA_FILE, CheckpointMetadata, encode_metadata
from toolkit.cli.main import run
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.load import load_experiment
from toolkit.experiment.load_checks import check_load_path


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dry_run(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert run(["train", "smoke", "--dry-run", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return [line.removeprefix("error: ") for line in err.splitlines()]


def source(**fields: Any) -> str:
    return f"--dataset.source={json.dumps({'type': 'files', **fields})}"


def test_files_patterns_and_load_path_are_checked_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, *lines = dry_run(
        capsys,
        source(paths=["nope.txt", "*.jsonl"]),
        "--dataset.tokenizer={type: tiktoken, path: nope.tiktoken}",
        "--dataset.instructions={chat_template: nope.jinja}",
        "--train_module.freeze=[blocks.9.*]",
        "--train_module.optim.group_overrides=[{params: ['*bias'], opts: {weight_deca: 0}}]",
        "--trainer.load_path=nope",
        "--trainer.load_strategy=always",
        "--dataset.sequence_length=256",
    )
    assert first == "9 problems, one a line:"
    assert [line.split(" (")[0].split("; ")[0] for line in lines] == [
        "dataset.sequence_length 256 is longer than model.max_sequence_length 128",
        "train_module.optim.group_overrides.0.params: '*bias' matches no parameter",
        "train_module.optim.group_overrides.0.opts: no setting 'weight_deca'",
        "train_module.freeze: 'blocks.9.*' matches no parameter",
        "dataset.source.paths: nope.txt: no such file or folder",
        "dataset.source.paths: *.jsonl: matches no file",
        "dataset.tokenizer.path: nope.tiktoken: no such file",
        "dataset.instructions.chat_template: 'nope.jinja' is no Jinja text",
        "trainer.load_path nope: holds no valid checkpoint, there is no such folder",
    ]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([source(paths=["empty"])], "dataset.source.paths: empty: no file to read (looked for"),
        ([source(paths=["e.txt"])], "dataset.source.paths: e.txt: the file is empty"),
        (["--dataset.source={type: disk, path: empty}"], "dataset.source.path: empty: no data set"),
        (["--dataset.tokenizer={type: hf, path: ./nope}"], "dataset.tokenizer.path: ./nope: no"),
        (["--dataset.tokenizer={type: hf, path: empty}"], "dataset.tokenizer.path: empty: holds"),
        (["--dataset.mix={sources: {a: {ratio: 1, source: {type: files, paths: [nope]}}}}",
          "--dataset.source=null"],
         "dataset.mix.sources.a.source.paths: nope: no such file or folder"),
        (["--dataset.eval_sets={x: {source: {type: files, paths: [nope]}}}"],
         "dataset.eval_sets.x.source.paths: nope: no such file or folder"),
        (["--dataset.eval_sets={..: {}}"], "dataset.eval_sets...: dataset_name must be a relative"),
        (["--dataset.eval_sets={'': {}}"], "dataset.eval_sets.: dataset_name must be a relative"),
        (["--dataset.eval_sets={x: {dataset_name: ..}}"], "dataset.eval_sets.x"),
        (["--dataset.eval_sets={val_ema: {}}", "--trainer.callbacks.ema.enabled"],
         "dataset.eval_sets.val_ema: the evaluation of val by trainer.callbacks.ema has this name"),
        (["--train_module.optim.type=lion", "--train_module.optim.eps=1e-8"],
         "train_module.optim.eps: no such field; known: betas, group_overrides, layer_lr_decay"),
    ],
)  # fmt: skip
def test_a_dry_run_looks_at_files(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "e.txt").touch()
    (line,) = dry_run(capsys, *flags)
    assert line.startswith(expected)


def test_files_that_are_there_are_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.TXT").write_text("text")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    for path in ("deep", "deep/er/a.TXT", "deep/*/a*"):
        flags = [source(paths=[path]), "--dataset.tokenizer={type: hf, path: tok}"]
        assert run(["train", "smoke", "--dry-run", *flags]) == 0
    assert run(["train", "smoke", "--dry-run", "--dataset.tokenizer={type: hf, path: gpt2}"]) == 0


def checkpoint(folder: Path, **model: Any) -> Path:
    folder.mkdir(parents=True)
    config = load_experiment("smoke").config.model.to_dict() | model
    metadata = CheckpointMetadata(
        version=2, step=3, tokens=9, engine="single", world_size=1, files={},
        extra={"model": config},
    )  # fmt: skip
    (folder / METADATA_FILE).write_bytes(encode_metadata(metadata))
    return folder


def test_the_model_of_load_path_is_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint(tmp_path / "old" / "checkpoints" / "step3", d_model=64, rope_theta=7.0)
    (line,) = dry_run(capsys, "--trainer.load_path=old")
    assert line == (
        "old/checkpoints/step3: was saved from another model: model.d_model (was 64, is 32), "
        "model.rope_theta (was 7.0, is 10000.0); set it back, or start a new run"
    )
    (line,) = dry_run(capsys, "--trainer.load_path=old", "--trainer.load_weights_only")
    assert "model.d_model" in line
    assert "rope_theta" not in line  # of a longer context
    flags = ["--model.d_model=64", "--model.rope_theta=7.0", "--trainer.load_path=old"]
    assert run(["train", "smoke", "--dry-run", *flags]) == 0


def test_what_is_to_be_loaded_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = dry_run(capsys, "--trainer.load_weights_only")
    assert line == "trainer.load_weights_only: there is nothing to load; add trainer.load_path"


def test_load_path_is_looked_up_as_a_start_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint(tmp_path / "old" / "checkpoints" / "step3")
    newest = checkpoint(tmp_path / "old" / "checkpoints" / "step4")
    (newest / METADATA_FILE).write_bytes(b"damaged")
    assert run(["train", "smoke", "--dry-run", "--trainer.load_path=~/old"]) == 0
    assert run(["train", "smoke", "--dry-run", f"--trainer.load_path={newest}"]) == 2


def test_a_run_that_goes_on_from_its_own_checkpoints_needs_no_load_path(tmp_path: Path) -> None:
    flags = ["--trainer.load_path=gone", "--trainer.load_strategy=always"]
    config = load_experiment("smoke", flags).config
    checkpoint(tmp_path / "run" / "checkpoints" / "step3")
    check_load_path(config, tmp_path / "run")


def test_a_start_refuses_the_same_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from toolkit.cli.main import run;"
        "code = run(['train', 'smoke', '--name', 'x', '--train_module.freeze=[nope]',"
        "'--trainer.load_path=nope', '--trainer.load_strategy=always']);"
        "print(code, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k != "RANK"},
    )  # fmt: skip
    assert result.stdout == "2 False\n"
    assert [line[:40] for line in result.stderr.splitlines()] == [
        "error: 2 problems, one a line:",
        "error: train_module.freeze: 'nope' match",
        "error: trainer.load_path nope: holds no ",
    ]
    assert not any(tmp_path.iterdir())


_BESIDE = [
    "data_loader.global_batch_size 1000 is not divisible by dataset.sequence_length 128 x 1 rank "
    "= 128",
    "dataset.source.paths: nope.txt: no such file or folder",
    "dataset.tokenizer.path: ./nope: no such file or folder",
    "trainer.load_path nope: holds no valid checkpoint, there is no such folder",
]


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        ({"num_heads": 3}, [], "model: d_model 32 is not divisible by num_heads 3"),
        ({"num_heads": "x"}, [], "model.num_heads: expected a whole number, not 'x'"),
        ({"preset": "llama"}, [], "model.preset: 'llama': no such preset"),
        ("llama_271M", [], "model: expected a mapping, not 'llama_271M'"),
        ({}, ["--model.preset=llama", "--model.n_layer=3"],
         "model.preset: 'llama': no such preset"),
        ({}, ["--model=llama_271M"], "model: expected a mapping, not 'llama_271M'"),
        ({}, ["--trainer.hard_stop=3"],
         "trainer.hard_stop: expected a mapping with value, unit or null, not 3"),
    ],
)  # fmt: skip
def test_what_does_not_depend_on_the_refused_section_is_told_too(
    model: Any,
    flags: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    data = load_experiment("smoke").config.to_dict()
    data["model"] = {**data["model"], **model} if isinstance(model, dict) else model
    if "preset" in data["model"]:
        data["model"] = model
    data["dataset"] |= {
        "sequence_length": 128,
        "source": {"type": "files", "paths": ["nope.txt"]},
        "tokenizer": {"type": "hf", "path": "./nope"},
    }
    data["data_loader"]["global_batch_size"] = 1000
    data["train_module"]["rank_microbatch_size"] = None
    data["train_module"]["freeze"] = ["nope.*"]  # of which nothing is said without the model
    data["trainer"] |= {"load_path": "nope", "load_strategy": "always"}
    Path("my.json").write_text(json.dumps(data))
    for start in (["--dry-run"], []):
        assert run(["train", "my.json", *start, *flags]) == 2
        err = capsys.readouterr().err
        lines = [line.removeprefix("error: ").split("; ")[0] for line in err.splitlines()]
        lines = [line.removesuffix(" (in my.json)") for line in lines]
        assert [line for line in lines if "train_module.freeze" not in line] == [
            f"{len(lines) - 1} problems, one a line:", f"{expected}", *_BESIDE
        ]  # fmt: skip
        assert ("train_module.freeze" in err) == ("model" not in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["my.json"]


MESSAGES = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def test_a_missing_chat_template_is_told_before_the_data_is_prepared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("chat.jsonl").write_text(f"{MESSAGES}\n")
    Path("plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("tok").mkdir()
    Path("tok/tokenizer.json").write_text("{}")
    Path("tok/tokenizer_config.json").write_text('{"chat_template": null}')
    local, chat = "--dataset.tokenizer={type: hf, path: ./tok}", source(paths=["chat.jsonl"])
    advice = "give one in dataset.instructions.chat_template (Jinja text or a file)"
    expected = {
        "auto": "the rows are conversations (so is the first one of chat.jsonl)",
        "messages": "the rows are conversations (dataset.instructions.shape is messages)",
    }
    for shape, why in expected.items():
        asked = f"--dataset.instructions={{shape: {shape}}}"
        (line,) = dry_run(capsys, chat, local, asked)
        missing = f"the tokenizer has no chat template, and {why}; {advice}"
        assert line == f"dataset.tokenizer.path: ./tok: {missing}"
        (line,) = dry_run(capsys, chat, asked)
        assert line == f"dataset.tokenizer: {missing}"
    asked = "--dataset.instructions={}"
    given = "--dataset.instructions={chat_template: '{{ messages[0].content }}'}"
    hub = "--dataset.tokenizer={type: hf, path: gpt2}"
    for flags in ([source(paths=["plain.jsonl"]), asked], [chat, given], [chat, hub, asked]):
        assert run(["train", "smoke", "--dry-run", *flags]) == 0
    Path("tok/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert run(["train", "smoke", "--dry-run", chat, local, asked]) == 0
    Path("tok/tokenizer_config.json").unlink()
    Path("tok/chat_template.jinja").write_text("{{ messages }}")
    assert run(["train", "smoke", "--dry-run", chat, local, asked]) == 0


def test_columns_of_parquet_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"conversations": [["x"]]}), "a.parquet")
    (line,) = dry_run(capsys, source(paths=["a.parquet"]), "--dataset.instructions={}")
    assert "(so is the first one of a.parquet)" in line


def test_a_dry_run_knows_what_evaluations_give(capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--trainer.callbacks.checkpointer.best_metric="
    (line,) = dry_run(capsys, f"{flag}val/losss")
    assert line.endswith(
        "no evaluation gives 'val/losss'; there are val/loss, val/ppl, val/bits_per_byte"
    )
    check_experiment(load_experiment("smoke", [f"{flag}val/ppl"]).config, batch_ranks=1)


def test_a_local_load_path_is_no_url(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = dry_run(capsys, "--trainer.load_path=file:///abs/run")
    assert line.endswith("a URL; write the path itself: /abs/run")


def test_what_the_device_cannot_do_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = ["--train_module.float8_config.filter=[]", "--train_module.precision=bf16"]
    assert run(["train", "smoke", "--name", "first", *flags]) == 2
    assert "try its numbers with --train_module.float8_config.emulate=true" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()
