"""start_run's refusals, and a registry that is only an index."""

import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from toolkit.data.config import StoreConfig
from toolkit.errors import RunError
from toolkit.runs.config import RunConfig
from toolkit.runs.database import RunIndex
from toolkit.runs.files import RUN_FILES
from toolkit.runs.listing import list_runs, reindex
from toolkit.runs.registry import (
    check_run_folder,
    choose_run_name,
    is_run,
    resolve_run_folder,
    start_run,
)
from toolkit.runs.status import read_status
from toolkit.train.callbacks.config import CheckpointerConfig

STARTER = """
import sys
from toolkit.runs.registry import start_run
run = start_run("exp", sys.argv[2], root=sys.argv[1])
run.set_status("running", step=7)
run.wait()
if len(sys.argv) > 3:
    import os
    os._exit(9)
run.close("finished")
"""


def start_elsewhere(root, name, *more):
    return subprocess.Popen([sys.executable, "-c", STARTER, root, name, *more])


def by_name(root, **options):
    return {record.name: record for record in list_runs(root, **options)}


def test_folder_follows_the_config_and_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_run_folder(RunConfig(), "t") == tmp_path / "runs/default/t"
    named = RunConfig(experiment="e", name="n", root="elsewhere")
    assert resolve_run_folder(named, "t") == tmp_path / "elsewhere/e/n"
    assert resolve_run_folder(RunConfig(name="n", save_folder="f"), "t") == tmp_path / "f"


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (RunConfig, "save_folder"),
        (RunConfig, "mirror"),
        (StoreConfig, "permanent_root"),
        (CheckpointerConfig, "upload_to"),
    ],
)
@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://host/x", r"http:// is for reading token files; .*s3://"),
        ("https://host/x", r"https:// is for reading"),
        ("s3://", r"names no folder; write s3://bucket/run"),
        ("file:///", r"names no folder; write file:///its/path/run"),
        ("s3://bucket/mine?versionId=1", r"its path holds '\?', which"),
        ("gs://bucket/mine#17", r"its path holds '#', which"),
        ("s3://bucket//two//x", r"its path holds '//', which"),
        ("file://tmp/x", r"three slashes, .*: file:///tmp/x"),
    ],
)
def test_a_url_that_nothing_can_be_kept_at_is_refused_at_once(kind, field, url, problem):
    with pytest.raises(ValueError, match=f"{field}: {re.escape(url)}: .*{problem}"):
        kind(**{field: url})


def test_chosen_names_are_sortable_and_differ():
    first, second = choose_run_name(), choose_run_name()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", first)
    assert first != second


def test_new_run_has_its_folders_and_metadata(tmp_path):
    with start_run("exp", root=tmp_path, environment={"engine": "ddp"}) as run:
        pass
    assert run.folder == tmp_path / "exp" / run.name
    for name in ("metadata", "metrics", "checkpoints", "logs"):
        assert (run.folder / name).is_dir()
    assert not (run.folder / "tb").exists()  # it is made where TensorBoard is on
    for file in (RUN_FILES.command, RUN_FILES.git, RUN_FILES.environment, RUN_FILES.status):
        assert run.path(file).stat().st_size > 2
    assert '"engine": "ddp"' in run.path(RUN_FILES.environment).read_text()


def test_name_that_exists_is_refused_and_names_resume(tmp_path):
    run = start_run("exp", "one", root=tmp_path)
    run.log_metadata({}, RUN_FILES.config)
    run.close("finished")
    with pytest.raises(RunError) as error:
        start_run("exp", "one", root=tmp_path)
    folder = tmp_path / "exp" / "one"
    assert str(error.value) == (
        f"{folder}: this run exists; continue it with `toolkit resume {folder}` "
        "or choose another name (--name)"
    )


def test_save_folder_is_the_run_folder_and_may_be_used_again(tmp_path):
    folder = tmp_path / "mine"
    for attempt in (1, 2):
        run = start_run("exp", root=tmp_path / "runs", save_folder=folder)
        assert (run.folder, run.name, run.attempt) == (folder, "mine", attempt)
        run.close("stopped")


def test_resumed_run_stays_in_its_registry_wherever_the_command_runs(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    start_run("exp", "one", root=root).close("stopped")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = start_run("exp", "one", save_folder=root / "exp" / "one", resume=True)
    run.close("finished", step=9)
    assert os.listdir(tmp_path / "elsewhere") == []
    from toolkit.runs.database import RunIndex

    (row,) = RunIndex(f"sqlite:///{root}/registry.sqlite").all()
    assert (row.state, row.step) == ("finished", 9)


def test_save_folder_outside_a_root_that_is_not_there_yet_is_listed(tmp_path, caplog):
    run = start_run("exp", root=tmp_path / "runs", save_folder=tmp_path / "mine")
    run.close("finished")
    assert "registry" not in caplog.text
    assert by_name(tmp_path / "runs")["mine"].folder == str(tmp_path / "mine")


def test_leftovers_of_a_start_cut_short_are_no_obstacle_but_other_files_are(tmp_path):
    for name in ("metadata", "metrics", "checkpoints"):
        (tmp_path / "exp" / "one" / name).mkdir(parents=True)
    start_run("exp", "one", root=tmp_path).close("finished")
    (tmp_path / "exp" / "two" / "checkpoints" / "step5").mkdir(parents=True)
    with pytest.raises(RunError, match="exists but is not a run"):
        start_run("exp", "two", root=tmp_path)
    assert os.listdir(tmp_path / "exp" / "two") == ["checkpoints"]


def test_resume_of_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no such run folder"):
        start_run("exp", "one", root=tmp_path, resume=True)
    (tmp_path / "exp" / "one").mkdir(parents=True)
    with pytest.raises(RunError, match="not a run folder"):
        start_run("exp", "one", root=tmp_path, resume=True)
    assert os.listdir(tmp_path / "exp" / "one") == []


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write there \(Not a directory\).*--save-folder"):
        start_run("exp", save_folder=tmp_path / "file" / "run", root=tmp_path)


def test_a_run_that_is_being_written_is_refused(tmp_path):
    run = start_run("exp", "one", root=tmp_path)
    with pytest.raises(RunError, match=f"pid {os.getpid()} on "):
        start_run("exp", "one", root=tmp_path, resume=True)
    run.close("finished")
    assert run.attempt == 1


def test_list_shows_progress_from_the_newest_metrics(tmp_path):
    run = start_run("exp", "one", root=tmp_path)
    run.set_status("running", step=5, tokens=500)
    lines = b'{"step":11,"tokens":1100,"loss":2.5}\n{"step":12,"tokens":1200,"loss":"nan"}\n{"st'
    run.path(RUN_FILES.train_metrics).write_bytes(lines)
    record = by_name(tmp_path)["one"]
    assert (record.state, record.step, record.tokens) == ("running", 12, 1200)
    assert record.loss != record.loss
    # A rank that is lost takes metrics of the last steps with it.
    lines = b'{"step":70,"tokens":7000,"loss":2.83}\n'
    run.path(RUN_FILES.train_metrics).write_bytes(lines)
    run.close("failed", step=72, tokens=7200, loss=5.5)
    record = by_name(tmp_path)["one"]
    assert (record.state, record.step, record.tokens, record.loss) == ("failed", 72, 7200, 2.83)


def test_run_whose_process_died_is_shown_as_dead_and_can_be_resumed(tmp_path):
    assert start_elsewhere(tmp_path, "one", "die").wait() == 9
    assert by_name(tmp_path)["one"].state == "dead"
    run = start_run("exp", "one", root=tmp_path, resume=True)
    assert run.attempt == 2
    assert by_name(tmp_path)["one"].state == "running"
    run.close("finished")


def test_concurrent_runs_share_the_registry(tmp_path):
    processes = [start_elsewhere(tmp_path, f"run{i}") for i in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    from toolkit.runs.database import RunIndex

    rows = RunIndex(f"sqlite:///{tmp_path}/registry.sqlite").all()
    assert sorted(row.name for row in rows) == [f"run{i}" for i in range(4)]
    assert {(row.state, row.step) for row in rows} == {("finished", 7)}


def test_unreachable_registry_is_one_warning_and_the_run_goes_on(tmp_path, caplog):
    url = f"sqlite:///{tmp_path}/no/such/folder/r.sqlite"
    with caplog.at_level(logging.WARNING):
        run = start_run("exp", "one", root=tmp_path, registry_url=url)
        run.set_status("running", step=1)
        run.close("finished")
    warnings = [r.message for r in caplog.records if "run registry" in r.message]
    assert len(warnings) == 1
    assert "not reachable" in warnings[0]
    assert by_name(tmp_path, registry_url=url)["one"].state == "finished"


def test_reindex_rebuilds_from_folders_and_keeps_runs_elsewhere(tmp_path):
    root = tmp_path / "runs"
    start_run("exp", "one", root=root).close("finished", step=3)
    start_run("exp", "gone", root=root).close("finished")
    start_run("exp", root=root, save_folder=tmp_path / "elsewhere").close("stopped")
    for path in sorted((root / "exp" / "gone").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert {n: r.state for n, r in by_name(root).items()} == {
        "one": "finished", "gone": "missing", "elsewhere": "stopped",
    }  # fmt: skip
    assert reindex(root) == 2
    assert {n: r.state for n, r in by_name(root).items()} == {
        "one": "finished", "elsewhere": "stopped",
    }  # fmt: skip
    (root / "registry.sqlite").unlink()
    assert reindex(root) == 1
    assert by_name(root)["one"].step == 3


def test_listing_an_empty_root_makes_nothing(tmp_path):
    assert list_runs(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_starting_imports_neither_torch_nor_sqlalchemy_at_import():
    code = (
        "import sys, toolkit.runs.registry; "
        "print([m for m in ('torch', 'sqlalchemy', 'psutil') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "[]\n"


def test_is_run(tmp_path):
    assert not is_run(tmp_path)
    run = start_run("exp", "one", root=tmp_path)
    assert is_run(run.folder)
    assert is_run(str(Path(run.folder)))
    run.close("finished")


def test_a_registry_that_another_process_holds_delays_no_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("toolkit.runs.database._BUSY_SECONDS", 0.1)
    start_run("exp", "before", root=tmp_path).close("finished")
    other = sqlite3.connect(tmp_path / "registry.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    attempts: list[object] = []
    put = RunIndex.put
    monkeypatch.setattr(RunIndex, "put", lambda self, row: attempts.append(row) or put(self, row))
    with caplog.at_level(logging.WARNING):
        run = start_run("exp", "one", root=tmp_path)
        for step in range(50):
            run.set_status("running", step=step)
            run.wait()
        run.close("finished", step=50)
    assert len(attempts) == 2  # at the first status and at the last, not at each
    assert caplog.text.count("run registry") == 1
    assert read_status(run.folder).step == 50
    other.close()
    assert reindex(tmp_path) == 2


def test_a_registry_that_never_answers_is_left_at_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("toolkit.runs.manager.CLOSE_SECONDS", 0.1)
    answers = threading.Event()
    monkeypatch.setattr("toolkit.runs.database.RunIndex", lambda url: answers.wait(60))
    with caplog.at_level(logging.WARNING):
        run = start_run("exp", "one", root=tmp_path)
        run.close("finished")
    assert caplog.text.count("`toolkit runs reindex` brings it up to date") == 1
    assert read_status(run.folder).state == "finished"
    answers.set()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://bar", "no such kind of database: foo; write sqlite"),
        ("registry.sqlite", "not the URL of a database; write sqlite"),
        ("postgresql://me@host:port/runs", "not the URL of a database"),
        ("mysql://me@host/runs", "mysql needs a driver that is not installed"),
        ("sqlite:////no/such/folder/r.sqlite", "/no/such/folder: no such folder; make it"),
    ],
)
def test_what_can_never_be_a_registry_is_refused_before_the_run(tmp_path, url, message):
    with pytest.raises(RunError, match=f"run.registry: {message}"):
        check_run_folder(RunConfig(root=str(tmp_path), registry=url), "one")
    assert not any(tmp_path.iterdir())


def test_a_registry_that_may_answer_later_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite://", "sqlite:///r.sqlite", f"sqlite:///{tmp_path}/r.sqlite"):
        check_run_folder(RunConfig(root=str(tmp_path), registry=url), "one")


def test_a_name_under_which_nothing_was_trained_is_free_and_keeps_its_logs(tmp_path, caplog):
    folder = tmp_path / "exp" / "one"
    config = RunConfig(experiment="exp", name="one", root=str(tmp_path))
    first = start_run("exp", "one", root=tmp_path)
    first.log_metadata({"seed": 1}, RUN_FILES.config)
    (folder / "logs" / "rank0.log").write_text("why it failed")
    (folder / "metrics" / "train.jsonl").touch()
    with pytest.raises(RunError, match="this run exists"):  # it is being started now
        check_run_folder(config, "")
    first.close("failed", step=0, message="float8 needs another device")
    check_run_folder(config, "")
    with caplog.at_level(logging.INFO, "toolkit"):
        second = start_run("exp", "one", root=tmp_path)
    assert f"{folder}: attempt 1 trained nothing; it begins anew" in caplog.text
    assert second.attempt == 2
    assert not second.path(RUN_FILES.config).exists()  # it is the next one's to write
    assert (folder / "metadata" / "config.attempt1.json").read_text() == '{\n  "seed": 1\n}\n'
    assert (folder / "logs" / "rank0.log").read_text() == "why it failed"
    second.close("stopped")
    start_run("exp", "one", root=tmp_path).close("failed")


@pytest.mark.parametrize("what", ["step", "line", "checkpoint"])
def test_a_name_under_which_something_was_trained_is_taken(tmp_path, what):
    run = start_run("exp", "one", root=tmp_path)
    if what == "line":
        run.path(RUN_FILES.train_metrics).write_text('{"step": 1}\n')
    elif what == "checkpoint":
        run.path("checkpoints/step5").mkdir()
    run.close("failed", step=3 if what == "step" else None)
    before = sorted(str(path) for path in run.folder.rglob("*"))
    with pytest.raises(RunError, match="the script that began it and start_run") as error:
        start_run("exp", "one", root=tmp_path)
    assert "toolkit resume" not in str(error.value)  # which has no config to start from
    assert sorted(str(path) for path in run.folder.rglob("*")) == before
