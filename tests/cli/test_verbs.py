"""What the small verbs print."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from toolkit.cli import main as cli
from toolkit.experiment.sources import recipe_names, recipe_text
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import start_run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.run(args) == 0
    return capsys.readouterr().out


def test_recipes_lists_all_with_size_and_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    header, *rows, _, files = output(capsys, "recipes").splitlines()
    assert files.startswith("for `accelerate launch --config_file`")
    assert "fsdp.yaml" in files
    assert header.split() == ["recipe", "parameters", "sequence", "needs", "what", "for"]
    cells = {row.split()[0]: row.split()[1:4] for row in rows}
    assert set(cells) == set(recipe_names())
    assert cells["quickstart"] == ["2,557,632", "256", "nothing"]
    assert cells["llama3_8B"] == ["8,030,261,248", "8192", "download"]


@pytest.mark.parametrize("width", [80, 160])
def test_recipes_fit_a_terminal_and_are_found_by_a_part_of_the_name(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = output(capsys, "recipes", "list", "olmo2")
    monkeypatch.setenv("COLUMNS", str(width))
    told = output(capsys, "recipes", "list", "olmo2")
    assert max(map(len, told.splitlines())) <= width < max(map(len, whole.splitlines()))
    table, files = told.split("\n\n")
    names = [line.split()[0] for line in table.splitlines() if not line.startswith(" ")]
    wanted = {name for name in recipe_names() if "olmo2" in name.lower().replace("-", "")}
    assert set(names) - {"recipe"} == wanted
    assert "official/OLMo-2-1124-7B-stage1" in names
    for text in ("hsdp.yaml", "zero2.json"):
        assert text in files
    words = set(whole.replace(",", "").split())
    assert words <= set(told.replace(",", "").split()) | {"recipe", "what", "for", "-"}


def test_recipes_show_and_copy_give_the_file_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert output(capsys, "recipes", "show", "smoke") == recipe_text("smoke")
    assert output(capsys, "recipes", "copy", "smoke", "mine.json").startswith("mine.json: edit it")
    assert (tmp_path / "mine.json").read_text() == recipe_text("smoke")
    said = output(capsys, "recipes", "copy", "fsdp.yaml")
    assert said == (
        "fsdp.yaml: `accelerate launch --config_file fsdp.yaml -m toolkit train CONFIG`\n"
    )
    assert (tmp_path / "fsdp.yaml").read_text() == recipe_text("fsdp.yaml")
    assert output(capsys, "recipes", "copy", "smoke.json").startswith("smoke.json: edit it")
    assert str(tmp_path / "zero2.json") in output(capsys, "recipes", "copy", "zero2.json")


def test_schema_describes_fields_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(output(capsys, "schema"))
    experiment = schema["$defs"]["ExperimentConfig"]["properties"]
    presets = experiment["model"]["anyOf"][-1]["properties"]["preset"]["enum"]
    assert "gpt2_124M" in presets
    for name, definition in schema["$defs"].items():
        for field, entry in definition.get("properties", {}).items():
            if field != "type" and name != "CallbacksConfig":
                assert entry.get("description"), f"{name}.{field} has no docstring"


def test_runs_without_runs_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = "no runs in runs; start one with `toolkit train quickstart`\n"
    assert output(capsys, "runs") == text
    assert output(capsys, "runs", "list") == text


def test_runs_lists_and_reindexes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = start_run("quickstart", "first", root=tmp_path / "r")
    run.close("finished", step=7, tokens=7168, loss=4.5, engine="ddp", world_size=2)
    header, row = output(capsys, "runs", "list", "--root", "r").splitlines()
    assert header.split()[:5] == ["run", "id", "state", "step", "tokens"]
    name, number, *rest = row.split()
    assert (name, len(number)) == ("quickstart/first", 8)
    assert rest[:4] == ["finished", "7", "7.17k", "4.5000"]
    assert rest[-1] == "r/quickstart/first"
    assert output(capsys, "runs", "reindex", "--root", "r") == "1 run in the registry of r\n"


def test_prepare_makes_token_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * 100)
    args = [
        "prepare", "smoke", "--dataset.source={type: files, paths: [a.txt]}",
        "--dataset.dataset_name=a",
        "--dataset.validation_fraction=0", "--data-root", "D", "--dataset.num_processes=1",
    ]  # fmt: skip
    line = output(capsys, *args)
    assert line == (
        "D/a/bytes_small: 1,201 training tokens, 0 validation tokens, vocabulary of 257 (uint16)\n"
    )
    assert (tmp_path / "D/a/bytes_small/train.bin").stat().st_size == 2402
    assert output(capsys, *args) == line


@pytest.mark.parametrize(
    "words",
    [
        ["export-hf", "run", "s3://bucket/out"],
        ["convert-hf", "model", "gs:/bucket/out"],
        ["recipes", "copy", "smoke", "https://host/mine.json"],
        ["data", "tokenize", "texts", "--out", "s3://bucket/out"],
        ["data", "merge", "a", "b", "--out", "s3://bucket/out"],
        ["data", "split", "a", "--parts", "2", "--out", "az://bucket/out"],
    ],
    ids=lambda words: words[1],
)
def test_what_is_written_here_has_no_url(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(words) == 2
    assert "is a URL, and this must be on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_root_that_was_named_is_used_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no runs in runs" in output(capsys, "runs")
    assert cli.run(["runs", "--root", "nowhere"]) == 2
    assert "--root: nowhere: no such folder" in capsys.readouterr().err
    assert cli.run(["runs", "--root", "elsewhere", "list"]) == 2
    assert "--root goes after the verb: toolkit runs list --root ..." in capsys.readouterr().err


def test_batch_of_a_checkpoint_at_a_url_names_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    step = "file:///b/run/checkpoints/step20"
    assert cli.run(["batch", step, "5"]) == 2
    said = f"error: {step}: a checkpoint, not a run; type: toolkit batch file:///b/run 5\n"
    assert capsys.readouterr().err == said


def test_runs_list_says_where_a_run_is_whose_copy_here_is_gone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    database = sqlite3.connect(tmp_path / "registry.sqlite")
    start_run("e", "old", root=tmp_path).close("finished")
    # A registry of before there were mirrors.
    database.execute("ALTER TABLE runs DROP COLUMN mirror")
    run = start_run("e", "one", root=tmp_path, save_folder=tmp_path / "copy" / "one")
    run.log_metadata({"run": {"mirror": "s3://b/one"}, "model": {}}, RUN_FILES.config)
    run.close("finished", step=7)
    shutil.rmtree(tmp_path / "copy")
    said = output(capsys, "runs", "list", "--root", str(tmp_path))
    one, old = sorted(said.splitlines()[1:], key=lambda line: "e/old" in line)
    assert "missing" in one
    assert one.endswith(f"{run.folder}; mirrored at s3://b/one")
    assert old.endswith("e/old")


def test_a_tag_may_have_any_letters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start_run("exp", "one", root="runs").close("finished")
    assert cli.run(["runs", "tag", "one", "+best", "+high", "-nosuch"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("one: best, high\n")
    assert err.endswith("one: has no tag nosuch\n")
    assert cli.run(["runs", "tag", "one", "-high"]) == 0
    assert capsys.readouterr().out.endswith("one: best\n")
    assert output(capsys, "runs", "tag", "-h").startswith("Usage: toolkit runs tag")
    assert cli.run(["runs", "remove", "one"]) == 2
    assert "type: toolkit runs rm one" in capsys.readouterr().err
