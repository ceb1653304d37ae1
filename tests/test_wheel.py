"""What is built is complete: installed in an environment of its own, away from the repository."""

import contextlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.e2e._run import environ

ROOT = Path(__file__).parents[1]
PACKED = ("toolkit", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel` does, without its environment and its network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes beside what it packs
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta as b; print(b.build_wheel({str(folder)!r}))"
    run([sys.executable, "-c", code], source)
    return next(folder.glob("*.whl"))


def run(command: Sequence[str | Path], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, env=environ(), capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("toolkit/")}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "toolkit").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packed == there
    assert "toolkit/recipes/engines/fsdp.yaml" in packed


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and the libraries that tests run with."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    site = next(folder.glob("lib/python*/site-packages"))
    libraries = (path for path in sys.path if path.endswith("site-packages"))
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], folder)
    return folder / "bin"


def test_the_installed_command_has_its_recipes_and_launcher_files(
    installed: Path, tmp_path: Path
) -> None:
    toolkit = installed / "toolkit"
    run([toolkit, "recipes", "copy", "fsdp.yaml"], tmp_path)
    assert "fsdp_version: 2" in (tmp_path / "fsdp.yaml").read_text()
    said = run(
        [toolkit, "train", "quickstart", "--processes=2", "--engine=fsdp", "--dry-run"], tmp_path
    )
    assert "fsdp, 2 processes, from --engine" in said
    said = run(
        [toolkit, "launch", "smoke", "--to=slurm", "--nodes=2", "--name=first", "--dry-run"],
        tmp_path,
    )
    assert "#SBATCH --nodes=2" in said
    assert f"{installed / 'python'} " in said


@pytest.mark.slow
def test_what_is_installed_works_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import toolkit; print(toolkit.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    toolkit = installed / "toolkit"
    short = ("--trainer.hard_stop={value: 2, unit: steps}", "--trainer.no_evals")
    small = (*short, "--dataset.source.max_bytes=300000", "--dataset.num_processes=1")
    assert "done at step 2" in run([toolkit, "train", "quickstart", *small], tmp_path)
    said = run([toolkit, "train", "smoke", "--processes=2", "--engine=zero1", *short], tmp_path)
    assert "on 2 processes, zero1 in" in said
    run([toolkit, "recipes", "copy", "zero3.yaml"], tmp_path)
    run([toolkit, "recipes", "copy", "smoke", "mine.json"], tmp_path)
    launch = [installed / "python", "-m", "accelerate.commands.launch"]
    yaml = ["--config_file", "zero3.yaml", "--num_processes", "2"]
    said = run([*launch, *yaml, "-m", "toolkit", "train", "mine.json", *short], tmp_path)
    assert "on 2 processes, zero3 in" in said


def test_the_extra_all_is_every_extra_that_installs_together() -> None:
    """Each is in it, or named beside it; what is installed here satisfies it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    inner = [Requirement(text) for text in extras["all"]]
    assert {requirement.name for requirement in inner} == {"toolkit"}
    together = {extra for requirement in inner for extra in requirement.extras}
    apart = {"dev", "docs", "all", "eval", "comet", "clearml", "swanlab", "aim", "beaker", "fla"}
    assert together | apart == set(extras)
    assert not together & apart
    wanted = [Requirement(text) for extra in (*together, "dev") for text in extras[extra]]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name in {requirement.name for requirement in wanted}:  # theirs, as far as it is installed
        with contextlib.suppress(PackageNotFoundError):
            theirs = map(Requirement, requires(name) or [])
            wanted += [r for r in theirs if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        if (version := pinned.get(requirement.name)) is not None:
            assert requirement.specifier.contains(version), requirement
