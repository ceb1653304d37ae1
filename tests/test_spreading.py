"""Tests of a file stay in one process of pytest-xdist, and a session where they do not fails."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGIN = "from tests.spreading import pytest_configure, pytest_xdist_make_scheduler\n"
TESTS = "import pytest\n\n@pytest.mark.parametrize('n', range(6))\ndef test_one(n): pass\n"


def run_spread(folder: Path, conftest: str, dist: str) -> subprocess.CompletedProcess[str]:
    """Two files of six tests, spread over two processes."""
    folder.joinpath("conftest.py").write_text(conftest)
    for name in ("test_a.py", "test_b.py"):
        folder.joinpath(name).write_text(TESTS)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            dist,
            "-p",
            "no:cacheprovider",
            ".",
        ],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_file_stays_in_one_process_whatever_dist_says(tmp_path: Path) -> None:
    result = run_spread(tmp_path, PLUGIN, "load")
    assert result.returncode == 0, result.stdout
    assert "12 passed" in result.stdout


def test_a_session_fails_where_two_processes_share_a_file(tmp_path: Path) -> None:
    without = PLUGIN.replace(", pytest_xdist_make_scheduler", "")
    result = run_spread(tmp_path, without, "each")
    assert result.returncode == 1
    assert "24 passed" in result.stdout
    assert "test_a.py was run by several processes" in result.stdout
