"""Which data a run trains on: its own name, its own place, its own text; and targets that are few.

In this process, with the command line's words.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main as cli
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer
from toolkit.experiment.load import load_experiment

QUICK = [
    "--dataset.num_processes=1", "--data_loader.eval_tokens=64", "--trainer.no_evals",
    "--trainer.callbacks.checkpointer={interval: 2, export_hf: false}",
    "--trainer.callbacks.console_logger.interval=1",
    "--trainer.callbacks.system_monitor.enabled=false",
    "--trainer.callbacks.network_monitor.enabled=false",
]  # fmt: skip
STOPPED = ["--trainer.max_duration.value=4", "--trainer.hard_stop={value: 2, unit: steps}"]
SOURCE = "--dataset.source={type: files, paths: [text.txt]}"


def records(folder: Path, stream: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"metrics/{stream}.jsonl").open()]


def losses(folder: Path) -> list[Any]:
    return [record["loss"] for record in records(folder)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a run of 4 steps on it, and one that stopped after 2."""
    place = tmp_path_factory.mktemp("first")
    (place / "text.txt").write_text("".join(f"line {n}, {n * n}\n" for n in range(2000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        whole = ["--trainer.max_duration.value=4", "--save-folder", "whole"]
        assert cli.run(["train", "smoke", SOURCE, *QUICK, *whole]) == 0
        assert cli.run(["train", "smoke", SOURCE, *QUICK, *STOPPED, "--save-folder", "run"]) == 0
    return place


@pytest.mark.slow
def test_own_data_does_not_lie_under_the_name_of_the_recipes(first: Path) -> None:
    (folder,) = (first / "data").glob("[!.]*")
    assert folder.name.startswith("text-")
    assert (folder / "bytes_small" / "train.bin").is_file()


@pytest.fixture
def moved(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as on another machine: what was recorded of the first is not there."""
    place = tmp_path / "moved"
    shutil.copytree(first, place)
    for command in place.glob("*/metadata/command.json"):
        words = json.loads(command.read_text())
        command.write_text(json.dumps({**words, "cwd": str(tmp_path / "gone")}))
    monkeypatch.chdir(place)
    return place


def test_a_run_moves_with_its_prepared_data_alone(
    moved: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").unlink()
    # A new run must say what it trains on.
    (data,) = Path("data").glob("[!.]*")
    again = [SOURCE, f"--dataset.dataset_name={data.name}", "--name", "new"]
    assert cli.run(["train", "smoke", *again, *QUICK]) == 2
    error = capsys.readouterr().err
    assert "text.txt: no such file or folder; data/text-" in error
    assert "set dataset.source=null" in error
    assert not Path("runs/smoke").exists()
    assert cli.run(["resume", "run", "--trainer.hard_stop=null"]) == 0
    assert losses(moved / "run") == losses(first / "whole")
    stored = json.loads(Path("run/metadata/config.json").read_text())
    assert stored["dataset"]["source"]["paths"] == ["text.txt"]


def test_recorded_places_go_before_the_current_folder(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    run = tmp_path / "run"
    shutil.copytree(first / "run", run)
    # Another text with the same names where the run is resumed from.
    here.mkdir()
    (here / "text.txt").write_text("something else\n" * 2000)
    monkeypatch.chdir(here)
    (data,) = (first / "data").glob("[!.]*")
    flags = ["--dataset.validation_fraction=0.1", f"--dataset.dataset_name={data.name}"]
    assert cli.run(["prepare", "smoke", SOURCE, *flags]) == 0
    assert (here / "data" / data.name / "bytes_small/train.bin").is_file()
    assert cli.run(["resume", str(run), "--trainer.hard_stop=null"]) == 0
    assert losses(run) == losses(first / "whole")


def test_a_folder_that_the_command_line_gives_is_the_one(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset.root=elsewhere", "--dataset.source=null", "--trainer.hard_stop=null"]
    assert cli.run(["resume", "run", *flags]) == 2
    assert "elsewhere/text-" in capsys.readouterr().err


NAMES = [
    (["--dataset.source={type: files, paths: [a/my.texts.txt]}"], "my-"),
    (["--dataset.source={type: files, paths: ['chats/*.jsonl']}"], "data-"),
    (["--dataset.source={type: hub, name: org/Set.v2}"], "Set-"),
    (["--dataset.source={type: disk, path: saved/}"], "saved-"),
    (["--dataset.source.max_bytes=1000"], "python_stdlib"),
    (["--dataset.source={type: python_stdlib}"], "python_stdlib"),
    (["--dataset.source=null"], "python_stdlib"),
    (["--dataset.source={type: files, paths: [a.txt]}", "--dataset.dataset_name=mine"], "mine"),
]


@pytest.mark.parametrize(("flags", "name"), NAMES)
def test_the_source_decides_the_name_of_own_data(flags: list[str], name: str) -> None:
    dataset = load_experiment("smoke", flags).config.dataset
    assert dataset.dataset_name.startswith(name)
    assert name.endswith("-") or dataset.dataset_name == name
    assert load_experiment("smoke", flags).config.dataset == dataset


def test_all_that_decides_tokens_decides_the_name_of_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def name(*flags: str) -> str:
        source = "--dataset.source={type: files, paths: [a.jsonl]}"
        return load_experiment("smoke", [source, *flags]).config.dataset.dataset_name

    Path("chat.jinja").write_text("one")
    ByteTokenizer().save("tok")
    template = "--dataset.instructions.chat_template="
    by_path = "--dataset.tokenizer={type: hf, path: tok}"
    others = [
        (), ("--dataset.instructions={}",), (f"{template}chat.jinja",), (f"{template}{{{{ 1 }}}}",),
        ("--dataset.instructions.train_on=all",), (by_path,), ("--dataset.append_eos=false",),
        ("--dataset.filters.min_characters=5",), ("--dataset.deduplicate=true",),
        ("--dataset.validation_fraction=0.25",),
    ]  # fmt: skip
    names = [name(*flags) for flags in others]
    assert len(set(names)) == len(names)
    assert [name(*flags) for flags in others] == names
    # How the tokens become rows does not.
    assert name("--dataset.instances={type: packed}", "--dataset.sequence_length=64") == names[0]
    Path("chat.jinja").write_text("two")
    assert name(*others[2]) not in names
    config = json.loads(Path("tok/tokenizer_config.json").read_text())
    Path("tok/tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    assert name(by_path) not in names


def test_other_sources_have_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        for more in ("", ", text_field: body"):
            flag = f"--dataset.source={{type: files, paths: [a.jsonl]{more}}}"
            loaded = load_experiment("smoke", [flag])
            assert loaded.origins["dataset.dataset_name"] == "--dataset.source"
            names.append(loaded.config.dataset.dataset_name)
    assert len(set(names)) == 4
    # A file of one's own that names data without a source names what the flag gives.
    own = tmp_path / "own.json"
    text = load_experiment("smoke").config.to_json()
    config = json.loads(text)
    config["dataset"] |= {"source": None, "dataset_name": "mine"}
    own.write_text(json.dumps(config))
    assert load_experiment(str(own), [SOURCE]).config.dataset.dataset_name == "mine"
    config["dataset"] |= {"dataset_name": "corpus"}
    own.write_text(json.dumps(config))
    assert load_experiment(str(own), [SOURCE]).config.dataset.dataset_name.startswith("text-")


def test_steps_and_evaluations_without_targets_have_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}" + "p" * 300, "completion": "a"} for n in range(20)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "train", "smoke", "--save-folder", "run", *QUICK,
        "--dataset.source={type: files, paths: [chat.jsonl]}", "--dataset.instructions={}",
        "--dataset.instances={type: packed}", "--trainer.no_evals=false",
        "--data_loader.global_batch_size=64", "--train_module.rank_microbatch_size=64",
        "--dataset.validation_fraction=0.4", "--trainer.max_duration.value=6",
        "--trainer.callbacks.lm_evaluator.interval=3",
    ]  # fmt: skip
    assert cli.run(args) == 0
    found = losses(tmp_path / "run")
    assert 0 < found.count("nan") < len(found)
    assert 0.0 not in found
    for record in records(tmp_path / "run"):
        assert (record["loss"] == "nan") == (record["grad_norm"] == 0.0)
        assert (record["ppl"] == "nan") == (record["loss"] == "nan")
        assert record["skipped"] == 0
    # The first 64 validation tokens are of a prompt.
    evaluations = records(tmp_path / "run", "eval")
    assert [(e["loss"], e["ppl"], e["num_targets"]) for e in evaluations] == [("nan", "nan", 0)] * 2
    shown = capsys.readouterr()
    console = shown.out + shown.err
    assert "loss nan" in console
    assert "loss 0.0000" not in console
    said = (tmp_path / "run/logs/rank0.log").read_text()
    assert said.count("its batch has no target token, so its loss is nan") == 1
    assert said.count("rows of this evaluation have no target token") == 1
    assert "rows of 64 tokens have no target" in console
    # Checkpoints made after such an evaluation are whole.
    metadata = json.loads((tmp_path / "run/checkpoints/step6/.metadata.json").read_text())
    assert not any(key.startswith("val/loss") for key in metadata["scores"])
    assert cli.run(["resume", "run", "--trainer.max_duration.value=7"]) == 0
