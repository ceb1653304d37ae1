"""Errors become one line and an exit code; help and dry runs stay light."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit
from toolkit.cli import main as cli
from toolkit.errors import CheckpointError, ToolkitError, TrainingError

FOLDER = Path(toolkit.__file__).parent


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def python(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("train", "Missing argument 'CONFIG'."),
        ("train --seed=3", "no CONFIG given; put it before the --PATH=VALUE overrides"),
        ("train quickstrt", "quickstrt: no such recipe or file; did you mean 'quickstart'?"),
        ("train smoke --nmae x", "no such option: --nmae; did you mean --name? "),
        ("train smoke --dry-rnu", "no such option: --dry-rnu; did you mean --dry-run? "),
        ("train smoke -n", "no such option: -n; see --help, and --a.b.c=VALUE for config"),
        ("train smoke --name", "Option '--name' requires an argument."),
        ("train smoke other", "unexpected argument 'other'; if it is the run's name, type: "
         "toolkit train smoke --name other"),
        ("train smoke a.b=3 --seed=1", "unexpected argument 'a.b=3'; type two dashes before it"),
        ("dry_run smoke --seed=1", "no such command: dry_run; type: toolkit train smoke --seed=1 "
         "--dry-run"),
        ("prep", "no such command: prep; type: toolkit prepare CONFIG"),
        ("train_single smoke", "no such command: train_single; type: toolkit train smoke"),
        ("eval ~nouser/x", "~nouser/x: no such user here"),
        ("convert-hf ~nouser/x out", "~nouser/x: no such user here"),
        ("export-hf " + "a" * 300 + " out", "a" * 240 + "...: File name too long"),
        ("resume " + "a" * 300, "a" * 240 + "...: File name too long"),
        ("train smoke --save-folder s3:/b/run", "run.save_folder: 's3:/b/run': a URL begins with "
         "s3://"),
        ("train smoke --run.mirror runs", "run: mirror: 'runs' is no URL; a folder is file:///its"),
        ("train smoke --base " + "a" * 300,
         "--base: the name aaaaaaaaaaaaaaaaaaaa... has 300 bytes"),
        ("generate x --seed=18446744073709551616", "Invalid value for '--seed': "),
        ("train smoke --sequence-length x", "Invalid value for '--sequence-length': "),
        ("train smoke --json", "--json belongs to --dry-run; "),
        ("train smoke --all", "--all belongs to --dry-run; "),
        ("train smoke --dry-run --json --yaml", "--json and --yaml are ways to print one thing"),
        ("train smoke --dry-run --train_module.optim.lrr=1",
         "train_module.optim.lrr: no such field; did you mean 'lr'?"),
        ("recipes olmo2", "No such command 'olmo2'. `toolkit recipes --help` lists them."),
        ("recipes list nope", "no recipe has 'nope' in its name; `toolkit recipes` lists them"),
        ("recipes show smok", "smok: no such recipe; did you mean 'smoke'?"),
        ("recipes copy fdsp.yaml", "fdsp.yaml: no such recipe; did you mean 'fsdp.yaml'?"),
        ("train smoke --processes 10000", "--processes 10000: this machine has "),
        ("train smoke --processes 2 --engine single", "--engine asks for the engine single"),
        ("train smoke --processes 2 --engine fsdp --train_module.dp_config.name=zero2",
         "two engines asked for: --engine says fsdp, train_module.dp_config says zero2"),
        ("train smoke --head h", "--head belongs to --nodes M"),
        ("verify . --processes 2", "--processes and --engine belong to --replay N"),
        ("prepare nope.json", "nope.json: no such file; recipes: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(
    args: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(args.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--debug", "train", "nope"], ["train", "nope", "--debug"]):
        assert cli.run(args) == 2
        assert "Traceback" in capsys.readouterr().err


def launched(monkeypatch: pytest.MonkeyPatch, *, rank: int, world_size: int) -> None:
    """As torchrun starts a process."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
        "TORCHELASTIC_RUN_ID": "none",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_other_ranks_keep_quiet_and_end_with_the_same_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", pauses.append)
    launched(monkeypatch, rank=1, world_size=2)
    assert cli.run(["train", "nope"]) == 2
    assert cli.run(["train", "smoke", "--dry-run"]) == 0
    assert capsys.readouterr() == ("", "")
    assert pauses == [1.0]


def test_an_error_of_another_rank_alone_is_shown_with_its_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        error = CheckpointError("rank8.pt: damaged")
        error.only_here = True
        raise error

    monkeypatch.setattr("toolkit.commands.load.load_experiment", fail)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node1")
    launched(monkeypatch, rank=8, world_size=16)
    assert cli.run(["train", "smoke"]) == 2
    assert capsys.readouterr().err == "error: [rank 8, node1] rank8.pt: damaged\n"


def test_who_starts_processes_is_one_of_each_machine_whatever_srun_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    words = ["train", "smoke", "--processes", "2", "--engine", "fsdp", "--dry-run"]
    assert cli.run(words) == 0
    assert "engine      fsdp, 2 processes, from --engine" in capsys.readouterr().out
    assert not {"WORLD_SIZE", "TOOLKIT_ENGINE"} & set(os.environ)


def test_a_rank_whose_launcher_is_not_there_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node1")
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert cli.run(["train", "smoke"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: [rank 3, node1] srun started 4 processes on several machines")
    assert "left from another command, unset them" in err
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cli.run(["train", "nope"]) == 2
    assert capsys.readouterr().err.startswith("error: [rank 3, node1] nope: no such")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainingError("10 steps skipped\nin a row"), 1, "error: 10 steps skipped in a row\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_error_has_its_exit_code(
    error: ToolkitError | KeyboardInterrupt,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("toolkit.commands.load.load_experiment", fail)
    assert cli.run(["train", "smoke"]) == code
    assert capsys.readouterr().err.strip("\n") == line.strip("\n")


def test_other_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("toolkit.commands.load.load_experiment", fail)
    with pytest.raises(ZeroDivisionError):
        cli.run(["train", "smoke"])


@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "resume",
        "prepare",
        "init",
        "models",
        "schema",
        "recipes",
        "recipes copy",
        "runs",
        "sweep",
        "report",
        "board",
        *(
            f"runs {verb}"
            for verb in (
                "list",
                "show",
                "compare",
                "diff",
                "tag",
                "note",
                "watch",
                "rm",
                "move",
                "archive",
                "restore",
                "reindex",
            )
        ),
    ],
)
def test_help_ends_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*verb.split(), "--help"]) == 0
    assert "Examples:\n    toolkit " in capsys.readouterr().out


def test_nothing_heavy_is_imported_for_help_or_a_dry_run(tmp_path: Path) -> None:
    code = (
        "import sys; from toolkit.cli.main import run;"
        "assert run(['--help']) == 0; light = set(sys.modules);"
        "assert run(['train', 'quickstart', '--dry-run']) == 0;"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'deepspeed', 'numpy'};"
        "print('heavy:', sorted(heavy & set(sys.modules)));"
        "print('for help:', sorted({'msgspec', 'rich', 'yaml', 'pydantic'} & light))"
    )
    result = python("-c", code)
    assert result.stderr == ""
    assert result.stdout.endswith("heavy: []\nfor help: []\n")


def test_the_package_runs_as_a_module_and_as_a_folder_from_anywhere() -> None:
    version = f"toolkit {toolkit.__version__}\n"
    assert python("-m", "toolkit", "--version", PYTHONPATH=str(FOLDER.parent)).stdout == version
    assert python(str(FOLDER), "--version").stdout == version


def test_modules_of_the_folder_do_not_hide_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.__main__ import _import_package_not_folder

    monkeypatch.setattr(sys, "path", [str(FOLDER), "/elsewhere"])
    _import_package_not_folder()
    assert sys.path == [str(FOLDER.parent), "/elsewhere"]


def test_a_closed_pipe_is_no_error() -> None:
    code = "from toolkit.cli.main import main; import sys; sys.argv[1:] = ['schema']; main()"
    command = f'{sys.executable} -c "{code}" | head -c 10; echo ${{PIPESTATUS[0]}}'
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr == ""
    assert result.stdout.endswith("0\n")


def test_the_dry_run_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--name a --sequence-length 128 --trainer.hard_stop={value:3,unit:steps}"
    flags = flags.replace("{value:3,unit:steps}", '{"value":3}')
    assert cli.run(["train", "quickstart", *flags.split(), "--dry-run", "--json"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.json").write_text(first)
    assert cli.run(["train", "again.json", "--dry-run", "--json"]) == 0
    assert capsys.readouterr().out == first
    assert json.loads(first)["trainer"]["hard_stop"] == {"value": 3, "unit": "steps"}
    assert cli.run(["train", "again.json", "--dry-run", "--yaml"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert cli.run(["train", "again.yaml", "--dry-run", "--json"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("word", ["tra", "schem", "mod"])
def test_the_shell_completes_commands(word: str) -> None:
    asked = {
        "_TOOLKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": f"toolkit {word}",
        "COMP_CWORD": "1",
    }
    code = "from toolkit.cli.main import main; import sys; sys.argv[1:] = []; main()"
    found = python("-c", code, **asked).stdout.split()
    assert found
    assert all(name.startswith(word) for name in found)


def test_libraries_that_nobody_asked_for_keep_quiet() -> None:
    code = (
        "import logging, sys\n"
        "from toolkit.cli.main import main\n"
        "sys.argv = ['toolkit', '--version']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0\n"
        "assert not logging.getLogger('torchao').isEnabledFor(logging.WARNING)\n"
        "assert logging.getLogger('toolkit').isEnabledFor(logging.WARNING)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_unknown_command_is_told_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert cli.run(["xyzzy"]) == 2
    assert "No such command 'xyzzy'. `toolkit --help` lists them." in capsys.readouterr().err
