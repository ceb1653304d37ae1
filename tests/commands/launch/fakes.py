"""Programs that stand in for those of a cluster, on a PATH of their own."""

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit import __version__
from toolkit.cli import main as cli
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import RunState, RunStatus
from toolkit.storage.atomic import write_json_atomic

SLURM = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")


def write_program(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(0o755)
    return path


def fake_slurm(place: Path, monkeypatch: pytest.MonkeyPatch, leave_out: str = "") -> Path:
    """The folder of a fake Slurm, whose programs are found first from here on."""
    programs, state = place / "bin", place / "slurm"
    programs.mkdir()
    state.mkdir()
    fake = Path(__file__).with_name("fake_slurm.py")
    for name in SLURM:
        if name != leave_out:
            write_program(
                programs / name,
                f"""\
                #!/bin/bash
                FAKE_SLURM_AS={name} exec {sys.executable} -S -E {fake} "$@"
                """,
            )
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return state


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def run(*words: str) -> int:
    return cli.run([*words])


def write_status(run: Path, state: RunState, attempt: int = 1) -> None:
    """What a run tells of itself."""
    now = "2030-01-01T00:00:00+00:00"
    status = RunStatus(
        state=state, experiment="smoke", name=run.name, attempt=attempt, created=now, started=now,
        updated=now, host="here", pid=1,
    )  # fmt: skip
    (run / RUN_FILES.metadata).mkdir(parents=True, exist_ok=True)
    write_json_atomic(run / RUN_FILES.status, status)


STUB = """\
#!{python} -SE
# In the place of `python`: what it was called with, and a run that takes a signal.
import json, os, signal, sys, time
host = os.environ.get("FAKE_HOST", "")
if sys.argv[1] == "-c":
    print("{version}", "3.0" if host == "other" else "2.0")
    sys.exit()
words = sys.argv[3:]
run = words[1] if words[0] == "resume" else words[words.index("--save-folder") + 1]
rank = words[words.index("--node-rank") + 1] if "--node-rank" in words else "0"
if host == "bad":
    while rank == "1" and not os.path.exists(os.path.join({place!r}, "ready0")):
        time.sleep(0.02)
    sys.exit("error: this machine has no GPU")
with open(os.path.join({place!r}, "calls"), "a") as file:
    file.write(json.dumps([words, dict(os.environ)]) + "\\n")

def commit(step):
    os.makedirs(os.path.join(run, "checkpoints", "step%d" % step), exist_ok=True)

def leave(number, frame):
    if os.environ.get("SAVES", "1") == "1":
        commit(10)
    print("saved on", signal.Signals(number).name, flush=True)
    os._exit(75)

for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, leave)
print(words[0], rank, flush=True)
if words[0] == "resume":
    commit(20)
    sys.exit(0)
time.sleep(0.1)
open(os.path.join(run, "metadata", "config.json"), "w").close()
open(os.path.join({place!r}, "ready" + rank), "w").close()
time.sleep(60)
"""


def stub_python(place: Path) -> Path:
    """A program in the place of Python, which notes its calls in `calls` there."""
    return write_program(
        place / "python", STUB.format(python=sys.executable, place=str(place), version=__version__)
    )


def fake_ssh(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `ssh` to this machine. `down` does not answer, `private` has folders of its own, and the
    answer to a start is lost by `mute`, by `gone` with every later one."""
    (place / "bin").mkdir()
    write_program(
        place / "bin" / "ssh",
        f"""\
        #!/bin/bash
        while [ "$1" != -- ]; do shift; done
        export FAKE_HOST=${{2##*@}}
        echo "$2" >> {place}/connections
        if [ "$FAKE_HOST" = down ]; then
          echo "ssh: connect to host down port 22: No route" >&2
          exit 255
        fi
        [ "$FAKE_HOST" != private ] || exec bash -s < <(sed 's#{place}#/nowhere#')
        [ "$FAKE_HOST" = mute -o "$FAKE_HOST" = gone ] || exec bash -c "$3"
        [ ! -e {place}/cut ] || exit 255
        script=$(cat)
        if [[ "$script" != *nohup* ]]; then exec bash -c "$script"; fi
        bash -c "$script" > /dev/null
        [ "$FAKE_HOST" = mute ] || touch {place}/cut
        exit 255
        """,
    )
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")
