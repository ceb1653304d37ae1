"""Running what the documentation shows."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.forked import Forked

ROOT = Path(__file__).parents[2]


def commands(text: str) -> list[str]:
    """The commands in the `console` blocks of a page."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def reader_folder(path: Path) -> Path:
    """`path` as a folder that looks like the repository's root, where commands may leave files."""
    for name in ("README.md", "docs", "toolkit", "accelerate_configs", "ds_configs"):
        (path / name).symlink_to(ROOT / name)
    return path


def run_command(command: str, folder: Path) -> str:
    """Run a command there; it succeeds and says something. Returns what it prints."""
    words = shlex.split(command)
    if words[0] == "toolkit" and not set(words) & {"|", ">", "&&"}:
        output = folder / f".output-{time.time_ns()}"
        code = Forked(words[1:], cwd=folder, env=os.environ, output=output).wait(120)
        said = output.read_text()
        output.unlink()
        assert code == 0, said
        assert said
        return said
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout or result.stderr or ">" in command
    return result.stdout
