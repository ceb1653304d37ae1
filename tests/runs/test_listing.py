"""The list from the registry alone, and runs by name, id and folder."""

import logging
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.runs.made import make_run
from toolkit.errors import RunError
from toolkit.runs import listing
from toolkit.runs.files import RUN_FILES
from toolkit.runs.index import read_index, update_index
from toolkit.runs.listing import find_named, find_run, list_runs, reindex


def listed(root, **options):
    return {run.name: run for run in list_runs(root, check=False, **options)}


def database(root: Path) -> sqlite3.Connection:
    return sqlite3.connect(root / "registry.sqlite", isolation_level=None)


def test_the_registry_tells_all_that_the_list_shows_and_no_folder_is_read(tmp_path, monkeypatch):
    make_run(tmp_path, "one", losses=[3.0, 2.5], val={1: 2.4, 2: 2.6})
    read = []
    monkeypatch.setattr(listing, "record_of", read.append)
    run = listed(tmp_path)["one"]
    assert read == []
    assert (run.state, run.step, run.tokens, run.loss) == ("finished", 2, 200, 2.5)
    assert (run.val_loss, run.val_step, run.best_val_loss, run.best_val_step) == (2.6, 2, 2.4, 1)
    assert (run.tokens_per_second, run.attempt) == (1001.5, 1)
    assert 0 <= run.seconds < 60
    monkeypatch.undo()
    assert list_runs(tmp_path) == [run]


def test_a_run_that_vanished_or_is_not_in_the_registry_is_read(tmp_path):
    make_run(tmp_path, "ran", losses=[3.0])
    # The registry believes that it still runs, and that it has done fewer steps.
    update_index(f"sqlite:///{tmp_path}/registry.sqlite", [listed(tmp_path)["ran"]])
    database(tmp_path).execute("UPDATE runs SET state = 'running', step = 0")
    new = make_run(tmp_path, "new", losses=[1.0])
    database(tmp_path).execute("DELETE FROM runs WHERE name = 'new'")
    (tmp_path / "exp" / ".hidden" / "metadata").mkdir(parents=True)
    shutil.copy(new / RUN_FILES.status, tmp_path / "exp" / ".hidden" / "metadata")
    assert {n: (r.state, r.step) for n, r in listed(tmp_path).items()} == {
        "ran": ("finished", 1),
        "new": ("finished", 1),
    }
    # It is in the registry from now on.
    assert sorted((r.name, r.step) for r in read_index(tmp_path, None)) == [("new", 1), ("ran", 1)]


def test_an_older_table_gets_its_columns_and_rows_are_filled_in(tmp_path):
    make_run(tmp_path, "one", losses=[3.0], val={1: 2.0})
    connection = database(tmp_path)
    for column in ("val_loss", "attempt", "seconds", "tags", "id"):
        connection.execute(f"ALTER TABLE runs DROP COLUMN {column}")
    assert listed(tmp_path)["one"].val_loss == 2.0
    ((loss, attempt),) = connection.execute("SELECT val_loss, attempt FROM runs")
    assert (loss, attempt) == (2.0, 1)


def test_a_damaged_registry_is_one_warning_and_reindex_makes_it_anew(tmp_path, caplog):
    make_run(tmp_path, "one", losses=[3.0])
    for path in tmp_path.glob("registry.sqlite*"):
        path.unlink()
    (tmp_path / "registry.sqlite").write_bytes(b"no database at all, " * 500)
    with caplog.at_level(logging.WARNING):
        assert listed(tmp_path)["one"].step == 1
    (warning,) = [r.message for r in caplog.records if "run registry" in r.message]
    assert "`toolkit runs reindex` makes it anew" in warning
    assert reindex(tmp_path) == 1
    assert [r.name for r in read_index(tmp_path, None)] == ["one"]
    assert (tmp_path / "registry.sqlite.damaged").is_file()


def test_a_locked_registry_delays_the_list_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("toolkit.runs.index._BUSY_SECONDS", 0.05)
    make_run(tmp_path, "one", losses=[3.0])
    other = database(tmp_path)
    other.execute("PRAGMA journal_mode=DELETE")
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("toolkit.runs.index.update_index", lambda *a: False)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(listing, "update_index", lambda *a: False)
        assert listed(tmp_path)["one"].step == 1
    assert "another process has locked it" in caplog.text


def test_runs_of_another_machine_keep_their_state_and_moved_ones_are_listed_once(tmp_path):
    here = make_run(tmp_path, "here", losses=[1.0])
    make_run(tmp_path, "there", losses=[1.0])
    connection = database(tmp_path)
    connection.execute(
        "UPDATE runs SET folder = '/no/such/place/there', host = 'other' WHERE name = 'there'"
    )
    shutil.rmtree(tmp_path / "exp" / "there")
    here.rename(tmp_path / "exp" / "elsewhere")
    found = list_runs(tmp_path, check=False)
    assert sorted((run.folder, run.state) for run in found) == [
        ("/no/such/place/there", "finished"),
        (str(tmp_path / "exp" / "elsewhere"), "finished"),
    ]


def test_runs_are_found_by_name_id_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    one, odd = make_run(root, "one"), make_run(root, "zwei ü")
    make_run(root, "one", experiment="other")
    ids = {run.folder: run.id for run in list_runs(root)}
    assert len({*ids.values()}) == 3
    assert find_run("zwei ü") == find_run("exp/zwei ü") == odd
    assert find_run("exp/one") == find_run(str(one)) == one
    assert find_run(ids[str(one)]) == find_run(ids[str(one)][:6]) == one
    assert find_named(f"{ids[str(odd)]}/checkpoints/step3") == f"{odd}/checkpoints/step3"
    with pytest.raises(RunError) as error:
        find_run("one")
    assert str(error.value) == (
        f"one: several runs have this name: {one} ({ids[str(one)]}), {root}/other/one "
        f"({ids[str(root / 'other' / 'one')]}); give one of them"
    )
    with pytest.raises(RunError, match="nope: no run has this name or id; `toolkit runs` lists"):
        find_run("nope")
    with pytest.raises(RunError, match="metadata: not a run folder"):
        find_run(str(one / "metadata"))
    shutil.rmtree(odd)
    with pytest.raises(RunError, match=r"zwei ü: its folder .* is gone, or on another machine"):
        find_run("zwei ü")
