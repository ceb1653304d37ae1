"""`toolkit.main(build_config)`: a Python file with the command line of `toolkit train`."""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.e2e._run import environ, run
from tests.forked import Forked
from tests.workers import free_port
from toolkit.cli import script

FILE = """
from pathlib import Path
import toolkit

class Marks(toolkit.Callback):
    def post_step(self):
        rank = self.state.environment.rank
        with (Path(__file__).parent / f"marks{rank}").open("a") as file:
            file.write(f"{self.state.step} ")

def build_config():
    config = toolkit.load_experiment("smoke").config.to_dict()
    config["trainer"]["callbacks"]["marks"] = {"type": "my_run:Marks"}
    config["trainer"]["callbacks"]["system_monitor"] = {"enabled": False}
    config["trainer"]["callbacks"]["checkpointer"] = {"interval": 2, "export_hf": False}
    config["trainer"]["max_duration"] = {"value": 2, "unit": "steps"}
    config["train_module"]["scheduler"] = {"type": "constant"}
    config["run"]["root"] = str(Path(__file__).parent / "runs")
    config["dataset"]["root"] = str(Path(__file__).parent / "data")
    config["dataset"]["source"] = {"type": "files", "paths": [__file__.replace(".py", ".txt")]}
    config["dataset"]["dataset_name"] = "mine"
    return config

GUARD
"""
GUARDED = 'if __name__ == "__main__":\n    toolkit.main(build_config)'
BARE = "toolkit.main(build_config)"


def write(folder: Path, guard: str = GUARDED) -> Path:
    folder.mkdir()
    (folder / "my_run.txt").write_text("".join(f"{n} and {n * n}\n" for n in range(900)))
    file = folder / "my_run.py"
    file.write_text(FILE.replace("GUARD", guard))
    return file


def start(file: Path | None, *words: str, cwd: Path, **more: str) -> Callable[[], tuple[int, str]]:
    """`python FILE words`, or `toolkit words`; what is returned waits for the end of it."""
    output = cwd / f"output{len(list(cwd.iterdir()))}"
    output.touch()
    process = Forked(words, cwd=cwd, env=environ() | more, output=output, file=file)
    return lambda: (process.wait(120), output.read_text())


def done(wait: Callable[[], tuple[int, str]]) -> str:
    code, output = wait()
    assert code == 0, output
    return output


@pytest.mark.parametrize("guard", [GUARDED, BARE], ids=["guarded", "bare"])
def test_a_file_trains_and_its_run_resumes_from_any_folder(guard: str, tmp_path: Path) -> None:
    file, here = write(tmp_path / "code", guard), tmp_path / "here"
    here.mkdir()
    done(start(file, "--name", "first", cwd=here))
    folder = file.parent / "runs" / "smoke" / "first"
    recorded = json.loads((folder / "metadata/command.json").read_text())
    assert f"{file}:build_config" in json.dumps(recorded)
    longer = ["resume", str(folder), "--trainer.max_duration.value=3"]
    if guard == BARE:
        # Code is found where the run found it, but not where anybody may have put it.
        file.parent.chmod(0o777)
        code, output = start(None, *longer, cwd=here)()
        assert code == 2
        assert f"modules are found in {here}, and where PYTHONPATH says" in output
        file.parent.chmod(0o700)
        done(start(None, *longer, cwd=here))
    else:
        done(start(file, *longer, cwd=here))
    assert (file.parent / "marks0").read_text().split() == ["1", "2", "3"]


def test_it_is_a_worker_of_a_launcher(tmp_path: Path) -> None:
    file = write(tmp_path / "code")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    ranks = [
        start(file, "--name", "two", cwd=tmp_path, **shared, RANK=rank, LOCAL_RANK=rank)
        for rank in "01"
    ]
    said = [done(rank) for rank in ranks]
    assert "on 2 processes" in said[0]
    assert [(file.parent / f"marks{rank}").read_text().split() for rank in "01"] == [["1", "2"]] * 2
    assert (file.parent / "runs/smoke/two/checkpoints/step2/.metadata.json").is_file()


def test_its_other_verbs_take_the_config_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "code")
    assert "train" in done(start(file, "prepare", cwd=tmp_path))
    assert (file.parent / "data/mine").is_dir()
    shown = done(start(file, "--dry-run", "--seed=9", cwd=tmp_path))
    assert f"{file}:build_config" in shown
    assert not (file.parent / "runs").exists()
    assert "lr: 0.01 throughout" in done(start(file, "schedule", cwd=tmp_path))
    assert f"plan of {file}:build_config" in done(start(file, "plan", cwd=tmp_path))
    assert "--dry-run" in done(start(file, "--help", cwd=tmp_path))
    code, output = start(file, "--sed=9", cwd=tmp_path)()
    assert (code, "no such option: --sed; did you mean --seed?" in output) == (2, True)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """What reaches the command line: its words, and PYTHONPATH."""
    found: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        script.command_line, "main", lambda: found.append((sys.argv, os.environ["PYTHONPATH"]))
    )
    return found


def build_config() -> str:
    return "smoke"


HERE = Path(__file__).resolve()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["train", f"{HERE}:build_config"]),
        (["--seed=3"], ["train", f"{HERE}:build_config", "--seed=3"]),
        (["train", "--dry-run"], ["train", f"{HERE}:build_config", "--dry-run"]),
        (["plan", "--search"], ["plan", f"{HERE}:build_config", "--search"]),
        (["resume", "runs/a", "--seed=3"], ["resume", "runs/a", "--seed=3"]),
    ],
)
def test_words_are_those_of_toolkit(
    words: list[str], expected: list[str], called: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["my.py", *words])
    monkeypatch.setenv("PYTHONPATH", "/others")
    toolkit.main(build_config)
    # Workers that are started from here find the classes too.
    assert called == [(["toolkit", *expected], f"{HERE.parent}{os.pathsep}/others")]


@functools.wraps(build_config)
def decorated() -> str:
    return build_config()


def test_a_decorated_function_is_found_by_its_name(
    called: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["my.py"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    toolkit.main(decorated)
    assert called == [(["toolkit", "train", f"{HERE}:build_config"], str(HERE.parent))]


@pytest.mark.parametrize(
    "function", [lambda: "smoke", functools.partial(build_config), len, "smoke"]
)
def test_what_no_worker_could_find_again_is_refused(
    function: Any, called: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        toolkit.main(function)
    assert end.value.code == 2
    assert "give a function that is defined at the top of the file" in capsys.readouterr().err
    assert called == []


@pytest.mark.slow
def test_a_run_of_two_processes_is_started_again_by_its_file(tmp_path: Path) -> None:
    """Real processes: torchrun, and the workers that `resume` starts."""
    file, here = write(tmp_path / "code"), tmp_path / "here"
    here.mkdir()
    words = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", file]
    result = run(*words, "--name", "two", cwd=here, timeout=240)
    assert result.code == 0, result.output
    folder = file.parent / "runs/smoke/two"
    words = [sys.executable, file, "resume", folder, "--trainer.max_duration.value=3"]
    result = run(*words, cwd=here, timeout=240)
    assert result.code == 0, result.output
    assert [(file.parent / f"marks{rank}").read_text().split()[-1] for rank in "01"] == ["3", "3"]


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean train? "), ("eval", ""), ("first", "")]
)
def test_a_word_that_is_no_verb_names_those_that_are(
    word: str, hint: str, called: list[Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["my.py", word, "runs/smoke/first"])
    with pytest.raises(SystemExit, match="2"):
        toolkit.main(build_config)
    verbs = "train, resume, prepare, plan, schedule, launch"
    said = f"error: unexpected argument {word!r}; {hint}{HERE.name} takes {verbs}, or flags alone"
    assert capsys.readouterr().err.startswith(said)
    assert called == []
