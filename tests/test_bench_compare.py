"""`benchmarks/compare.py`: an older revision against the working tree, on two made-up trees."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROGRAM = """
import json, sys, toolkit
figures = [{"name": "step", "value": toolkit.SECONDS, "unit": "s", "better": "lower"},
           {"name": "speed", "value": 1 / toolkit.SECONDS, "unit": "tokens/s", "better": "higher"}]
json.dump(figures, open(sys.argv[sys.argv.index("--json") + 1], "w"))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository whose commit takes 3 s a step, and whose working tree takes 2 s."""
    folder = tmp_path / "tree"
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "toolkit").mkdir()
    for name in ("compare.py", "_report.py"):
        shutil.copy(REPOSITORY / "benchmarks" / name, folder / "benchmarks")
    (folder / "benchmarks/loader.py").write_text(PROGRAM)
    write(folder, 3.0)
    git = ("git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@localhost")
    for line in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "slow")):
        subprocess.run([*git, *line], check=True)
    write(folder, 2.0)
    return folder


def write(folder: Path, seconds: float) -> None:
    (folder / "toolkit/__init__.py").write_text(f"SECONDS = {seconds}\n")


def compare(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "benchmarks/compare.py", "--turns", "2", "--only", "loader"]
    return subprocess.run([*program, *arguments], cwd=tree, capture_output=True, text=True)


def test_ratios_above_one_mean_better_for_times_and_for_speeds(tree: Path) -> None:
    done = compare(tree, "--base", "HEAD", "--worse", "0.1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "loader:" in line]
    assert [(row[2], row[-2]) for row in rows] == [("step", "1.50x"), ("speed", "1.50x")], rows
    worktrees = subprocess.run(
        ["git", "worktree", "list"], cwd=tree, capture_output=True, text=True, check=True
    )
    assert len(worktrees.stdout.splitlines()) == 1


def test_a_worse_figure_fails_where_that_is_asked(tree: Path) -> None:
    write(tree, 4.0)
    assert compare(tree, "--base", "HEAD").returncode == 0
    assert compare(tree, "--base", "HEAD", "--worse", "0.1").returncode == 1


def test_the_older_program_measures_where_this_one_does_not_run(tree: Path) -> None:
    (tree / "benchmarks/loader.py").write_text("import toolkit; toolkit.NEW\n" + PROGRAM)
    (tree / "toolkit/__init__.py").write_text("SECONDS = 1.5\nNEW = 1\n")
    done = compare(tree, "--base", "HEAD")
    assert "2.00x" in done.stdout, done.stderr
    assert "by its own program" in done.stdout


def test_an_unknown_revision_is_one_line(tree: Path) -> None:
    done = compare(tree, "--base", "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("git cannot check out nowhere")


def test_every_program_takes_its_arguments() -> None:
    spec = importlib.util.spec_from_file_location("compare", REPOSITORY / "benchmarks/compare.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))
    for name, arguments in module.PROGRAMS.items():
        text = (REPOSITORY / "benchmarks" / f"{name}.py").read_text()
        for option in (*(a for a in arguments if a.startswith("--")), "--json"):
            assert f'"{option}"' in text, f"{name}.py has no {option}"
