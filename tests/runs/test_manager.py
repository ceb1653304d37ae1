"""RunManager: attempts, status, metadata that loses nothing."""

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest

from toolkit.errors import RunError
from toolkit.runs import manager
from toolkit.runs.config import RunConfig
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import start_run
from toolkit.runs.status import read_status


def read(run, file):
    return json.loads(run.path(file).read_text())


def test_status_tells_state_progress_and_who(tmp_path):
    run = start_run("exp", "one", root=tmp_path)
    run.set_status("running", step=10, tokens=20480, engine="zero3", world_size=2, parameters=7)
    run.set_status("running", step=20, loss=3.5, note="x")
    run.close("stopped", message="signal SIGTERM", exit_reason="signal")
    status = read(run, RUN_FILES.status)
    assert status["state"] == "stopped"
    assert (status["step"], status["tokens"], status["loss"]) == (20, 20480, 3.5)
    assert (status["engine"], status["world_size"], status["parameters"]) == ("zero3", 2, 7)
    assert (status["message"], status["exit_reason"]) == ("signal SIGTERM", "signal")
    assert status["other"] == {"note": "x"}
    assert status["attempt"] == 1
    assert status["host"]
    assert status["pid"] > 0
    assert status["created"] <= status["started"] <= status["updated"]


def test_each_resume_is_one_attempt_more_and_keeps_progress(tmp_path):
    start_run("exp", "one", root=tmp_path).close("stopped", step=5, tokens=50)
    for attempt in (2, 3):
        run = start_run("exp", "one", root=tmp_path, resume=True)
        assert run.attempt == attempt
        status = read_status(run.folder)
        assert (status.state, status.step, status.tokens) == ("running", 5, 50)
        run.close("stopped")


def test_metadata_of_earlier_attempts_stays_when_it_differs(tmp_path):
    first = start_run("exp", "one", root=tmp_path)
    first.log_metadata({"lr": 1}, RUN_FILES.trainer_config)
    first.log_metadata({"lr": 2}, RUN_FILES.trainer_config)  # the same attempt corrects itself
    first.log_metadata(RunConfig(experiment="exp"), RUN_FILES.config, format="json")
    first.close("stopped")
    second = start_run("exp", "one", root=tmp_path, resume=True)
    second.log_metadata({"lr": 3}, RUN_FILES.trainer_config)
    second.log_metadata(RunConfig(experiment="exp"), RUN_FILES.config)
    second.close("finished")
    assert read(second, RUN_FILES.trainer_config) == {"lr": 3}
    assert read(second, "metadata/trainer_config.attempt1.json") == {"lr": 2}
    assert read(second, RUN_FILES.config)["experiment"] == "exp"
    assert not second.path("metadata/config.attempt1.json").exists()
    assert read(second, "metadata/command.attempt1.json")["attempt"] == 1
    assert read(second, RUN_FILES.command)["attempt"] == 2


def test_metadata_is_a_mapping_of_the_files_that_are_there(tmp_path):
    with start_run("exp", run_name="one", root=tmp_path) as run:
        run.metadata.log(RunConfig(experiment="exp"), RUN_FILES.config)
        run.metadata.log("# notes", "metadata/notes.txt", format="text")
    assert run.metadata[RUN_FILES.config]["experiment"] == "exp"
    assert run.metadata.read(RUN_FILES.config, RunConfig) == RunConfig(experiment="exp")
    assert {RUN_FILES.status, RUN_FILES.git, RUN_FILES.command} < set(run.metadata)
    assert len(run.metadata) == len(list(run.metadata))
    assert RUN_FILES.model_config not in run.metadata
    assert run.metadata.get(RUN_FILES.model_config) is None


def test_other_ranks_read_and_never_write(tmp_path):
    main = start_run("exp", "one", root=tmp_path)
    other = start_run("exp", "one", root=tmp_path, is_main=False)
    before = main.path(RUN_FILES.status).read_bytes()
    other.log_metadata({}, RUN_FILES.model_config)
    other.set_status("failed")
    other.close("failed")
    assert other.attempt == 1
    assert other.folder == main.folder
    assert main.path(RUN_FILES.status).read_bytes() == before
    assert not main.path(RUN_FILES.model_config).exists()
    main.close("finished")


def test_other_rank_that_does_not_see_the_folder_says_so(tmp_path):
    other = start_run("exp", "one", root=tmp_path / "local", is_main=False)
    with pytest.raises(RunError, match="does not see the folder"):
        _ = other.attempt


def test_a_run_left_by_an_error_is_failed_with_its_cause(tmp_path):
    with pytest.raises(ZeroDivisionError), start_run("exp", "one", root=tmp_path) as run:
        1 / 0  # noqa: B018
    status = read_status(run.folder)
    assert (status.state, status.exit_reason) == ("failed", "error")
    assert status.message == "ZeroDivisionError: division by zero"


def test_first_final_status_wins(tmp_path):
    with start_run("exp", "one", root=tmp_path) as run:
        run.close("stopped", step=3)
    assert read_status(run.folder).state == "stopped"


def test_a_writer_that_lost_its_lock_must_not_write(tmp_path):
    run = start_run("exp", "one", root=tmp_path)
    run._lock._lost = True
    with pytest.raises(RunError, match="took this run over"):
        run.set_status("running", step=1)
    run.close()


def test_a_writer_learns_at_once_that_it_lost_its_lock(tmp_path):
    run = start_run("exp", "one", root=tmp_path)
    run.check_owner()
    info = json.loads(run.path(RUN_FILES.lock_info).read_text())
    run.path(RUN_FILES.lock_info).write_text(json.dumps(info | {"token": "another"}))
    with pytest.raises(RunError, match="took this run over"):
        run.check_owner()
    run.close()
    assert run.path(RUN_FILES.lock_info).exists()  # it is the other's


def test_failing_background_work_is_a_warning(tmp_path, caplog):
    with start_run("exp", "one", root=tmp_path) as run, caplog.at_level(logging.WARNING):
        run.submit(lambda: (_ for _ in ()).throw(OSError("no such disk")))
        run.wait()
    assert "no such disk" in caplog.text
    assert read_status(run.folder).state == "finished"


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_status_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog):
    run = start_run("exp", "one", root=tmp_path)
    monkeypatch.setattr(manager, "write_json_atomic", full)
    with caplog.at_level(logging.WARNING):
        run.set_status("running", step=1)
        run.set_status("running", step=2)
    assert caplog.text.count("status.json: cannot be written") == 1
    assert read_status(run.folder).step is None
    run.close()


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_last_status_fits_on_a_full_disk(length, tmp_path, monkeypatch):
    """Over the bytes that are there; a message too long for them is left out."""
    run = start_run("exp", "one", root=tmp_path)
    run.set_status("running", step=1, note="x" * 300)
    monkeypatch.setattr(manager, "write_json_atomic", full)
    run.close("failed", step=7, message="m" * length, exit_reason="error")
    status = read_status(run.folder)
    assert (status.state, status.step, status.exit_reason) == ("failed", 7, "error")
    assert status.message == ("m" * length if length < 4096 else None)
    assert run.path(RUN_FILES.status).stat().st_size <= 4096


def test_a_read_only_disk_keeps_the_first_cause(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    run = start_run("exp", "one", root=tmp_path)
    monkeypatch.setattr(manager, "write_json_atomic", read_only)
    with pytest.raises(ValueError, match="the first cause"), run:
        raise ValueError("the first cause")
    assert not run.path(RUN_FILES.lock_info).exists()


def test_a_folder_that_was_removed_moved_or_replaced_is_noticed(tmp_path, caplog):
    run = start_run("exp", "one", root=tmp_path)
    assert run.find_removal() is None
    moved = run.folder.rename(tmp_path / "elsewhere")
    assert "was removed or moved" in str(run.find_removal())
    (run.folder / "metadata").mkdir(parents=True)
    assert run.find_removal() is not None
    # A file system that numbers its folders anew: the lock says that it is still ours.
    shutil.copy(moved / RUN_FILES.lock_info, run.path(RUN_FILES.lock_info))
    assert run.find_removal() is None
    shutil.rmtree(run.folder)
    with caplog.at_level(logging.WARNING):
        run.close("failed", message="removed")
    assert not run.folder.exists()
    assert "cannot be written" not in caplog.text
    moved.rename(run.folder)
    assert run.find_removal() is None


def test_what_only_informs_holds_no_secrets_and_the_config_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    run = RunManager(tmp_path, experiment="a", name="b")
    for file in (RUN_FILES.environment, RUN_FILES.command, RUN_FILES.origins, RUN_FILES.git):
        run.log_metadata({"a": ["--token", "hidden"], "url": "s3://b?sig=hidden"}, file)
        assert "hidden" not in run.path(file).read_text()
    run.set_status("failed", message="cannot reach postgresql://u:hidden@h/db")
    assert "hidden" not in run.path(RUN_FILES.status).read_text()
    run.log_metadata({"a": "postgresql://u:${NAME}@h/db"}, RUN_FILES.config)
    assert "u:${NAME}@h" in run.path(RUN_FILES.config).read_text()
