"""`toolkit runs`: the list narrowed, runs compared, and folders changed safely."""

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.runs.made import make_run
from toolkit.commands.runs import archive, compare, curves, listing, places, show, watch
from toolkit.commands.runs.listing import Wanted
from toolkit.errors import ConfigError, RunError, TrainingError
from toolkit.metrics.history import Series
from toolkit.runs.files import RUN_FILES
from toolkit.runs.index import read_index
from toolkit.runs.listing import list_runs
from toolkit.runs.lock import is_locked
from toolkit.runs.notes import read_notes
from toolkit.runs.registry import start_run
from toolkit.runs.status import read_status
from toolkit.train.progress import none_saved

CONFIG = {"run": {"name": "x"}, "train_module": {"optim": {"lr": 0.001}}, "seed": 0}


def names(root, **wanted):
    return [run.name for run in listing.list_all(str(root), None, Wanted(**wanted))]


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and str(path.relative_to(folder)) not in places.LOCK_FILES
    }


def test_the_list_is_filtered_sorted_and_cut(tmp_path):
    make_run(tmp_path, "a", losses=[3.0], val={1: 2.0}, config=CONFIG)
    make_run(tmp_path, "b", losses=[2.0], val={1: 3.0}, end="failed")
    make_run(tmp_path, "c-1", losses=[1.0], val={1: float("nan")}, end="stopped")
    places.tag(tmp_path / "exp" / "b", ["+x", "+y"], root=str(tmp_path), registry_url=None)
    assert names(tmp_path) == ["a", "b", "c-1"]
    assert names(tmp_path, states=["failed,stopped"]) == ["b", "c-1"]
    assert names(tmp_path, tags=["x", "y"]) == ["b"]
    assert names(tmp_path, name="c-*") == names(tmp_path, name="exp/c*") == ["c-1"]
    assert names(tmp_path, since="1h") == ["a", "b", "c-1"]
    assert names(tmp_path, where=["optim.lr=1e-3", "seed=0"]) == ["a"]
    assert names(tmp_path, where=["optim.eps=1"]) == []  # there is such a value, in no run here
    assert names(tmp_path, sort="val-loss") == ["a", "b", "c-1"]  # nan comes last
    assert names(tmp_path, sort="val-loss", reverse=True, limit=1) == ["b"]
    assert names(tmp_path, limit=1) == ["c-1"]
    for wrong, said in (
        ({"states": ["done"]}, "--state done: there are running, finished"),
        ({"sort": "bset"}, "--sort bset: no such column; did you mean best"),
        ({"since": "soon"}, "--since soon: write a number and s, m, h, d or w"),
        ({"where": ["lr"]}, "--where lr: write PATH=VALUE"),
        ({"limit": 0}, "--limit 0: give 1 or more"),
        ({"where": ["optim.lrr=1"]}, r"no such config value, .* mean train_module\.optim\.lr\?"),
    ):
        with pytest.raises(ConfigError, match=said):
            names(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("asked", "chosen", "said"),
    [("auto", None, "not compiled"), ("auto", True, "compiled"), (False, True, "not compiled")],
)
def test_a_page_says_threads_and_whether_it_is_compiled(tmp_path, asked, chosen, said):
    config = {"run": {"name": "a"}, "train_module": {"compile_model": asked}}
    run = make_run(tmp_path, "a", losses=[3.0], config=config)
    engine = {"precision": "bf16", "threads": 2, "device": "a CPU"}
    engine["chosen"] = {"compile_model": chosen}
    (run / RUN_FILES.engine).write_text(json.dumps(engine))
    [line] = [line for line in show.page(run) if line.startswith("machine")]
    assert line.endswith(f"bf16, 2 threads, {said}, a CPU")


def test_comparison_shows_what_differs_and_where_losses_part(tmp_path):
    base = [4.0, 3.0, 2.0, 1.0]
    a = make_run(tmp_path, "a", losses=base, config=CONFIG)
    other = {**CONFIG, "run": {"name": "b"}, "seed": 1, "train_module": {"optim": {"lr": 0.01}}}
    b = make_run(tmp_path, "b", losses=[4.0, 3.0, 2.0 + 1e-6, 1.5], config=other)
    c = make_run(tmp_path, "c", losses=[*base, 0.5], config=CONFIG)
    (b / RUN_FILES.origins).write_text('{"train_module.optim": "sweep.json"}')
    found = compare.compare([a, b, c])
    assert [(d.path, d.values, d.origins) for d in found.config] == [
        ("train_module.optim.lr", [0.001, 0.01, 0.001], ["", "sweep.json", ""]),
        ("seed", [0, 1, 0], ["", "", ""]),
    ]
    assert found.code == found.data == found.environment == []
    first, second = found.partings
    assert (first.compared, first.last_equal, first.first_step) == (4, 2, 3)
    assert (first.losses, first.beyond_step, first.largest) == ((2.0, 2.0 + 1e-6), 4, 0.5)
    (b / RUN_FILES.origins).write_text('{"train_module.optim.lr": "--train_module.optim.lr=1e-2"}')
    assert compare.shown(compare.compare([a, b]).config[0], 1) == "0.01 (flag)"
    lines = compare.parting_lines("B", first, 1e-3)
    assert lines[1] == f"   its batch: toolkit batch {b} 3"
    assert (second.compared, second.last_equal, second.first_step) == (4, 4, None)
    assert "run.name" in [d.path for d in compare.compare([a, b], everything=True).config]
    assert sum(map(len, compare.sections(compare.compare([a, c])).values())) == 0
    away = {"dataset": {"root": str(tmp_path / "data"), "source": {"paths": [str(tmp_path)]}}}
    near = {"dataset": {"root": "data", "source": {"paths": ["."]}}}
    for folder, config in ((a, near), (c, away)):
        (folder / RUN_FILES.config).write_text(json.dumps(config))
    assert [d.path for d in compare.compare([a, c]).config] == [
        "dataset.root",
        "dataset.source.paths",
    ]
    (a / RUN_FILES.command).write_text(json.dumps({"cwd": str(tmp_path)}))
    assert not compare.compare([a, c]).config
    null = [{"chosen": {"kernel": None}, "name": "single"}, {"name": "fsdp"}]
    assert [d.path for d in compare.differences(null)] == ["name"]
    with pytest.raises(ConfigError, match="the same run stands there twice"):
        compare.compare([a, a])


def test_curves_of_several_runs_share_a_chart():
    steps = np.arange(1, 101)
    zero = np.zeros(100)
    one = Series(steps, steps, zero, np.linspace(2.0, 1.0, 100))
    two = Series(steps, steps, zero, np.concatenate([[90.0, np.nan], np.full(98, 1.0)]))
    lines = curves.overlay({"A": one, "B": two}, width=40, rows=5)
    assert lines[0].lstrip().startswith(">1.98 |*A")  # 90 is drawn at the top
    assert lines[4].startswith("    1 |")
    assert lines[4].endswith("*")
    assert "A" in lines[2]
    assert "B" not in lines[2]
    assert lines[5].split() == ["step", "1", "100"]
    assert curves.overlay({}) == ["no values yet"]


def test_tags_and_notes_go_into_the_folder_and_the_registry(tmp_path):
    folder = make_run(tmp_path, "a")
    where = {"root": str(tmp_path), "registry_url": None}
    places.tag(folder, ["+b", "+a", "-none"], **where)
    places.note(folder, "why: ü", **where)
    (row,) = read_index(tmp_path, None)
    assert (row.tags, row.note) == ("a,b", "why: ü")
    places.tag(folder, ["-a", "-b"], **where)
    places.note(folder, "", **where)
    assert not (folder / RUN_FILES.notes).exists()
    for words, said in ((["a"], r"write \+a to add"), (["+a b"], "cannot be a tag")):
        with pytest.raises(ConfigError, match=said):
            places.tag(folder, words, **where)
    with pytest.raises(ConfigError, match="at most 1,000 characters"):
        places.note(folder, "x" * 1001, **where)
    start_run("exp", "a", root=tmp_path, resume=True).close("finished")
    assert read_notes(folder).tags == []


def test_a_live_run_is_neither_removed_nor_moved_nor_archived(tmp_path):
    run = start_run("exp", "a", root=tmp_path)
    before = everything(run.folder)
    where = {"root": str(tmp_path), "registry_url": None}
    for change in (
        lambda: places.remove(run.folder, **where),
        lambda: places.move(run.folder, str(tmp_path / "b"), **where),
        lambda: archive.archive(run.folder, str(tmp_path / "a.tar")),
    ):
        with pytest.raises(RunError, match=r"is being trained \(pid \d+ on .*stop it before it is"):
            change()
    assert everything(run.folder) == before
    assert sorted(os.listdir(tmp_path / "exp")) == ["a"]
    run.close("finished")


def test_a_removed_run_is_gone_whole_even_when_the_removal_is_killed(tmp_path, monkeypatch):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    where = {"root": str(tmp_path), "registry_url": None}

    def die(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(places, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            places.remove(one, **where)
    assert not one.exists()
    assert [run.name for run in list_runs(tmp_path)] == ["two"]
    places.remove(two, **where)
    assert os.listdir(tmp_path / "exp") == []  # what was left of `one` too
    assert read_index(tmp_path, None) == []


def test_a_moved_run_keeps_its_id_takes_the_new_name_and_can_go_on(tmp_path):
    folder = make_run(tmp_path, "one", losses=[1.0])
    own_id = read_status(folder).id
    where = {"root": str(tmp_path), "registry_url": None}
    two = places.move(folder, str(tmp_path / "exp" / "zwei ü"), **where)
    (row,) = read_index(tmp_path, None)
    assert (row.folder, row.name, row.id, row.state) == (str(two), "zwei ü", own_id, "finished")
    assert json.loads((two / RUN_FILES.config).read_text())["run"]["name"] == "zwei ü"
    assert not is_locked(two)
    (tmp_path / "old").mkdir()
    away = places.move(two, str(tmp_path / "old"), **where)
    assert away == tmp_path / "old" / "zwei ü"
    assert [run.folder for run in list_runs(tmp_path)] == [str(away)]
    run = start_run("exp", "zwei ü", save_folder=away, root=tmp_path, resume=True)
    run.close("finished")
    assert read_status(away).id == own_id
    make_run(tmp_path, "one")
    for dest, said in ((str(away), "exists"), (str(tmp_path / "exp/one/in/it"), "inside the run")):
        with pytest.raises(RunError, match=said):
            places.move(tmp_path / "exp" / "one", dest, **where)


def test_to_another_disk_a_run_is_copied_compared_and_then_removed(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "one", losses=[1.0])
    (folder / "checkpoints" / "link").symlink_to("../metadata/status.json")
    before, target = everything(folder), tmp_path / "other" / "exp" / "one"
    where = {"root": str(tmp_path), "registry_url": None}
    rename = os.rename

    def other_disk(source, dest):
        if str(source) == str(folder) and str(dest) == str(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, dest)

    monkeypatch.setattr(places.os, "rename", other_disk)
    with monkeypatch.context() as patch:
        hashes = iter("ab")
        patch.setattr(places, "hash_file", lambda path: next(hashes))
        with pytest.raises(TrainingError, match="reads back differently than"):
            places.move(folder, str(target), **where)
        assert everything(folder) == before
        assert os.listdir(target.parent) == []
    assert places.move(folder, str(target), **where) == target
    assert everything(target) == before
    assert (target / "checkpoints" / "link").is_symlink()
    assert os.listdir(tmp_path / "exp") == []


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.zst"])
def test_an_archive_is_the_run_again(tmp_path, ending):
    folder = make_run(tmp_path, "one", losses=[1.0])
    for step in (1, 2):
        (folder / f"checkpoints/step{step}").mkdir()
        (folder / f"checkpoints/step{step}/.metadata.json").write_text(f'{{"step": {step}}}')
    (folder / "checkpoints/step3.tmp").mkdir()
    out = tmp_path / f"a ü.{ending}"
    done = archive.archive(folder, str(out), checkpoints="last")
    assert done.left_out == ["checkpoints/step1", "checkpoints/step3.tmp"]
    other = archive.restore(str(out), None, root=str(tmp_path / "again"))
    again = tmp_path / "again" / "exp" / "one"
    assert other.place == str(again)
    before = everything(folder)
    del before["checkpoints/step1/.metadata.json"]
    after = everything(again)
    assert json.loads(after.pop(RUN_FILES.archive)) == {"left_out": done.left_out}
    assert after == before
    for change, said in (
        (lambda: archive.restore(str(out), None, root=str(tmp_path / "again")), "exists"),
        (lambda: archive.archive(folder, str(out)), "exists; give a name that is free"),
    ):
        with pytest.raises(RunError, match=said):
            change()
    bare = archive.archive(folder, str(tmp_path / f"b.{ending}"), checkpoints="none")
    assert bare.left_out == ["checkpoints"]


def test_a_run_restored_beside_its_original_is_another_run(tmp_path):
    folder = make_run(tmp_path, "one", losses=[1.0])
    archive.archive(folder, str(tmp_path / "a.tar"), checkpoints="none")
    copy = tmp_path / "exp" / "copy"
    archive.restore(str(tmp_path / "a.tar"), str(copy), root=str(tmp_path))
    one, other = read_status(folder), read_status(copy)
    assert one.id != other.id
    assert (one.name, other.name) == ("one", "copy")
    found = {name: listing.listing.find_run(name, root=tmp_path) for name in ("one", "copy")}
    assert found == {"one": folder, "copy": copy}
    assert "restored from an archive without checkpoints" in none_saved(copy, no_checkpoints=False)
    assert none_saved(folder, no_checkpoints=False) == "it was never saved"
    places.remove(folder, root=str(tmp_path), registry_url=None)
    again = archive.restore(str(tmp_path / "a.tar"), None, root=str(tmp_path))
    assert read_status(Path(again.place)).id == one.id
    shutil.copytree(folder, tmp_path / "exp" / "same")  # by other means: the same id and name
    for name in ("one", one.id):
        assert listing.listing.find_run(name, root=tmp_path) == folder


def test_a_damaged_archive_restores_nothing(tmp_path):
    folder = make_run(tmp_path, "one", losses=[1.0])
    out = tmp_path / "a.tar"
    archive.archive(folder, str(out))
    data = out.read_bytes()
    place = data.index(b'"tokens_per_second"')
    for broken, said in (
        (
            data[:place] + b'"tokens_per_minute"' + data[place + 19 :],
            "differ from its list, the fi",
        ),
        (data[: len(data) // 3], "cannot be read|cut short"),
        (b"nothing", "cannot be read"),
    ):
        out.write_bytes(broken)
        with pytest.raises(RunError, match=said):
            archive.restore(str(out), str(tmp_path / "again"), root=str(tmp_path))
    with tarfile.open(out, "w") as tar:
        tar.addfile(tarfile.TarInfo("one/../../evil"))
    with pytest.raises(RunError, match="is no file of a run"):
        archive.restore(str(out), str(tmp_path / "again"), root=str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "exp", "registry.sqlite"]
    with pytest.raises(ConfigError, match=r"give a name that ends in \.tar"):
        archive.archive(folder, str(tmp_path / "a.zip"))


def test_a_run_is_watched_until_it_ends(tmp_path):
    config = {"trainer": {"max_duration": {"value": 10, "unit": "steps"}}}
    folder = make_run(tmp_path, "one", losses=[3.0, 2.0], config=config, end="stopped")
    run = start_run("exp", "one", root=tmp_path, resume=True)
    assert watch.newest_running(str(tmp_path), None) == folder
    looks = watch.views(folder, seconds=0.01)
    view = next(looks)
    assert view.line == "step 2  loss 2.0000  1k tok/s  ETA 0s"
    assert not view.is_over
    run.close("finished")
    last = list(looks)[-1]
    assert last.is_over
    assert last.line.endswith("finished")
    with pytest.raises(RunError, match="no run trains at the moment"):
        watch.newest_running(str(tmp_path), None)
